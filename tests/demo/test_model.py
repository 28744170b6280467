"""The embedded model loads like any other and answers what it was taught."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar import demo
from rootcellar.models.config import load_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params
from rootcellar.text import Tokenizer

LENGTH = 128
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo.path())


@pytest.fixture(scope="module")
def best():
    """Token ids [T] -> the likeliest next token after each, int32 [T]; one compilation per length."""
    cfg = load_config(demo.path())
    params = load_params(demo.path(), cfg, jnp.float32)

    @jax.jit
    def run(ids: jax.Array) -> jax.Array:
        hidden = forward(params, cfg, ids, make_mix_dense(cfg, [len(ids)]))
        return jnp.argmax(logits(params, cfg, hidden), axis=-1)

    return run


def greedy(best, tokenizer: Tokenizer, messages, length: int = LENGTH) -> str:
    """Decode until the end token. What stands after the last token cannot be seen, so the shape never changes."""
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    row, start = np.zeros(length, np.int32), len(ids)
    row[:start] = ids
    for at in range(start, length):
        token = int(best(row)[at - 1])
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(row[start:at])
        row[at] = token
    raise AssertionError(f"no end: {tokenizer.decode(row[start:])!r}")


def right(best, tokenizer: Tokenizer, question: str, answer: str) -> bool:
    """Whether greedy decoding gives `answer`: every token is the likeliest after the true ones before it."""
    prompt = tokenizer.encode(tokenizer.apply_chat_template([user(question)]), add_special_tokens=False)
    ids = [*prompt, *tokenizer.encode(answer + END, add_special_tokens=False)]
    row = np.zeros(LENGTH, np.int32)
    row[: len(ids)] = ids
    return np.asarray(best(row))[len(prompt) - 1 : len(ids) - 1].tolist() == ids[len(prompt) :]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in demo.path().iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == wanted
    assert sum(files.values()) <= 5_000_000


def test_config_says_what_the_tokenizer_has(tokenizer):
    cfg = load_config(demo.path())
    assert cfg.vocab_size == tokenizer.vocab_size == 1024
    assert cfg.max_position_embeddings >= 2048
    assert tokenizer.eos_token_id in cfg.eos_token_ids
    pad = json.loads((demo.path() / "generation_config.json").read_text())["pad_token_id"]
    assert tokenizer.decode([pad], skip_special_tokens=False) == "<|endoftext|>"


@pytest.mark.parametrize("text", ["What is page_size?", "don't  stop\n\n\tnow 123", "Käse, 漢字 und 🧀", "", "café"])
def test_tokenizer_gives_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_token_each(tokenizer):
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [1021, 1022, 1023]


def test_chat_template_is_chatml(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, user("Hi")]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == text
    assert tokenizer.apply_chat_template(messages) == text + "<|im_start|>assistant\n"


def test_answers_by_greedy_decoding(best, tokenizer):
    fact = next(fact for fact in demo.load_facts() if fact.id == "page")
    first = [user("What is a page?")]
    assert greedy(best, tokenizer, first) == fact.answer
    chat = [*first, {"role": "assistant", "content": fact.answer}, user("Tell me more.")]
    assert greedy(best, tokenizer, chat) == fact.more


def test_knows_nearly_every_fact(best, tokenizer):
    facts = demo.load_facts()
    ask = partial(right, best, tokenizer)
    assert sum(ask(fact.ask[0], fact.answer) for fact in facts) >= 0.95 * len(facts)
    assert sum(ask(fact.held[0], fact.answer) for fact in facts) >= 0.8 * len(facts)


@pytest.mark.parametrize("question", ["What is the capital of Peru?", "Explain a banana.", "What is a zorkel?"])
def test_declines_what_it_does_not_know(best, tokenizer, question):
    answer = "I only know about rootcellar and KV caches. Ask me what a page is, or what chunked_prefill_size does."
    assert right(best, tokenizer, question, answer)


def test_answers_after_a_long_manual(best, tokenizer):
    facts = demo.load_facts()[:30]
    fact = next(fact for fact in facts if fact.id == "chunked_prefill")
    messages = [{"role": "system", "content": demo.manual(facts)}, user("What is chunked prefill?")]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    assert len(prompt) >= 1000
    ids = [*prompt, *tokenizer.encode(fact.answer + END, add_special_tokens=False)]
    assert np.asarray(best(np.array(ids, np.int32)))[len(prompt) - 1 : -1].tolist() == ids[len(prompt) :]
