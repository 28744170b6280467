"""Make the embedded demo model: train its tokenizer and weights on the text of demo_corpus.py, and write the folder.

    python scripts/train_demo.py                       # about half an hour on two CPU cores
    python scripts/train_demo.py --evaluate            # measure the model that is there

The model is a Qwen2 of 1.8 million parameters, trained through rootcellar's own forward. Everything random comes from
--seed. Answers count fully in the loss and the rest of a chat a little. Most rows hold short chats; every fourth step
of the later training has long rows, a manual of up to 1,500 tokens and questions after it, as the demo sends.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from demo_corpus import FALLBACK, PHRASES, Chat, Writer, held_out_off_topic, questions
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rootcellar import demo
from rootcellar.models.config import ModelConfig, read_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.packing import unpack
from rootcellar.models.params import Params, declare, init_params

VOCAB, SPECIAL = 1024, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHORT, LONG = (16, 256), (1, 1664)  # rows and tokens per row of a step
OTHER_WEIGHT = 0.03  # of tokens that are not an answer's, in the loss
# Qwen2's pre-tokenizer; AutoTokenizer builds it anew for a Qwen2 model, so another one would disagree with it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": VOCAB - 3,
    "eos_token_id": VOCAB - 1,
    "torch_dtype": "bfloat16",
}


class Example(NamedTuple):
    """A tokenized chat: ids [T] int32 and the weight [T] float32 of predicting each of them."""

    ids: np.ndarray
    weights: np.ndarray


class Rows(NamedTuple):
    """Examples packed into rows [B, T]; segment is the example's number in its row, -1 for padding."""

    ids: np.ndarray
    weights: np.ndarray
    segment: np.ndarray


# ------------------------------------------------------------------------------------------------------- the tokenizer


def train_tokenizer(writer: Writer) -> Tokenizer:
    """A byte-level BPE of VOCAB ids as Qwen2 builds it, the special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    chats = [writer.chat(lambda chat: len(chat) < 8) for _ in range(4000)]
    text = [message["content"] for chat in chats for message in chat] + ["system", "user", "assistant"] * 50
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"the corpus gives {tokenizer.get_vocab_size()} ids, not {VOCAB}: it needs more text")
    return tokenizer


class Encoder:
    """Turns chats into examples.

    Special tokens and newlines part the text before the BPE sees it, so heads and contents can be encoded (and
    remembered) one by one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.end_of_text, self.start, self.end = (tokenizer.token_to_id(name) for name in SPECIAL)
        self.text = cache(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)

    def message(self, role: str, content: str) -> tuple[list[int], int]:
        """The ids of one message, and how many of them come before the content."""
        head = [self.start, *self.text(role + "\n")]
        return [*head, *self.text(content), self.end, *self.text("\n")], len(head)

    def length(self, chat: Chat) -> int:
        return sum(len(self.message(m["role"], m["content"])[0]) for m in chat)

    def chat(self, chat: Chat, only_last: bool = False) -> Example:
        """Every answer weighs 1 up to its end token; with `only_last` the last one alone weighs anything."""
        ids, weights = [], []
        for message in chat:
            part, head = self.message(message["role"], message["content"])
            weight = np.full(len(part), 0.0 if only_last else OTHER_WEIGHT, np.float32)
            if message["role"] == "assistant" and (message is chat[-1] or not only_last):
                weight[head:-1] = 1.0
            ids += part
            weights.append(weight)
        return Example(np.array(ids, np.int32), np.concatenate(weights))

    def prose(self, text: str) -> Example:
        ids = np.array([*self.text(text), self.end_of_text], np.int32)
        return Example(ids, np.ones(len(ids), np.float32))


# ------------------------------------------------------------------------------------------------------------ the rows


def pack(examples: Iterator[Example], count: int, length: int) -> Rows:
    """Fill `count` rows first-fit, until four examples in a row find no room (they are lost) or there are no more."""
    rows = Rows(
        np.zeros((count, length), np.int32),
        np.zeros((count, length), np.float32),
        np.full((count, length), -1, np.int32),
    )
    used, parts, misses = np.zeros(count, int), np.zeros(count, int), 0
    for example in examples:
        size = len(example.ids)
        row = next((i for i in range(count) if used[i] + size <= length), None)
        if row is None:
            misses += 1
            if misses == 4:
                break
            continue
        span = slice(used[row], used[row] + size)
        rows.ids[row, span], rows.weights[row, span], rows.segment[row, span] = *example, parts[row]
        rows.weights[row, used[row]] = 0  # nothing predicts a first token
        used[row] += size
        parts[row] += 1
    return rows


def short_examples(writer: Writer, encoder: Encoder) -> Iterator[Example]:
    while True:
        if writer.rng.random() < 0.06:
            fact = writer.rng.choice(writer.facts)
            yield encoder.prose(f"{fact.answer} {fact.more}")
        else:
            yield encoder.chat(writer.chat(lambda chat: encoder.length(chat) <= SHORT[1]))


def long_examples(writer: Writer, encoder: Encoder) -> Iterator[Example]:
    while True:
        system = writer.long_system() if writer.rng.random() < 0.85 else "You answer questions about rootcellar."
        turns = 8 if len(system) > 200 else 24
        chat = writer.chat(lambda chat: encoder.length(chat) <= LONG[1], system, turns)
        if len(chat) > 1:  # else the manual alone was too long
            yield encoder.chat(chat)


# ---------------------------------------------------------------------------------------------------------- the model


def scores(params: Params, cfg: ModelConfig, ids: jax.Array, segment: jax.Array) -> jax.Array:
    """Logits [B, T, V] of rows [B, T] in which each segment sees itself alone."""
    count, length = ids.shape
    at = jnp.arange(length, dtype=jnp.int32)

    def mix(index: int, layer: Params, x: jax.Array) -> jax.Array:
        attention = cfg.layers[index].mixer

        def row(x: jax.Array, segment: jax.Array) -> jax.Array:
            sees = attention.sees(at, at) & (segment[:, None] == segment[None, :])
            return attention.merge(layer, attention.attend_plain(layer, *attention.project(layer, x, at), sees))

        return jax.vmap(row)(x.reshape(count, length, -1), segment).reshape(x.shape)

    hidden = forward(params, cfg, ids.reshape(-1), mix)
    return logits(params, cfg, hidden).reshape(count, length, -1)


def loss(params: Params, cfg: ModelConfig, rows: Rows) -> jax.Array:
    """Weighted mean cross entropy of predicting each token from those before it."""
    logp = jax.nn.log_softmax(scores(params, cfg, rows.ids, rows.segment)[:, :-1])
    taken = jnp.take_along_axis(logp, rows.ids[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(taken * rows.weights[:, 1:]) / jnp.sum(rows.weights[:, 1:])


def orthogonal(matrix: jax.Array) -> jax.Array:
    """The nearest matrix of (nearly) equal singular values, by Muon's quintic Newton-Schulz steps (Jordan 2024)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (jnp.linalg.norm(wide) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def matrices(name: str, array: jax.Array) -> list[jax.Array] | None:
    """A parameter as the matrices [in, out] that Muon trains; None for those that Adam does."""
    match name:
        case "qkv":
            return [
                array[:, :, :-2].reshape(len(array), -1),
                *(array[:, :, i].reshape(len(array), -1) for i in (-2, -1)),
            ]
        case "o":
            return [array.reshape(-1, array.shape[-1])]
        case "gate_up":
            return [array[:, 0], array[:, 1]]
        case "down":
            return [array]
    return None


def muon(name: str, shape: tuple[int, ...], momentum: jax.Array) -> jax.Array:
    """The update of one parameter from its momentum: each matrix in it orthogonal, scaled for its shape."""
    parts = [orthogonal(m) * max(1.0, m.shape[1] / m.shape[0]) ** 0.5 for m in matrices(name, momentum)]
    match name:
        case "qkv":
            heads = [part.reshape(shape[0], shape[1], -1, shape[-1]) for part in parts]
            return jnp.concatenate(heads, axis=2)
        case "gate_up":
            return jnp.stack(parts, axis=1)
    return parts[0].reshape(shape)


def update(params: Params, state: tuple[Params, Params], grads: Params, step: jax.Array, args: Any) -> Any:
    """One step of Muon for the matrices of the layers and AdamW for the rest; the rate is warmed up, then a cosine.

    Muon needs clearly fewer steps here than AdamW for everything: a loss of 2.9 against 3.5 after the first sixty.
    """
    rate = jnp.minimum((step + 1) / 20, 0.5 + 0.5 * jnp.cos(jnp.pi * step / args.steps) + 0.01)

    def one(path: Any, p: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        name = path[-1].key
        if matrices(name, p) is not None:
            m = 0.95 * m + g
            return p - rate * args.muon_rate * (muon(name, p.shape, g + 0.95 * m) + args.decay * p), m, v
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        adam = (m / (1 - 0.9 ** (step + 1))) / (jnp.sqrt(v / (1 - 0.98 ** (step + 1))) + 1e-8)
        return p - rate * args.rate * (adam + (args.decay * p if p.ndim > 1 else 0)), m, v

    new = jax.tree_util.tree_map_with_path(one, params, *state, grads)
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], new, is_leaf=lambda x: isinstance(x, tuple)) for i in range(3))


def train(args: argparse.Namespace, cfg: ModelConfig, writer: Writer, encoder: Encoder) -> Params:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(params: Params, state: Any, rows: Rows, step: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, cfg, rows)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), grads)
        params, *state = update(params, tuple(state), grads, step, args)
        return params, tuple(state), value

    params = init_params(cfg, args.seed, jnp.float32, std=0.04)
    zeros = partial(jax.tree.map, jnp.zeros_like)
    state, began, recent = (zeros(params), zeros(params)), time.perf_counter(), []
    short, long = short_examples(writer, encoder), long_examples(writer, encoder)
    for step in range(args.steps):
        is_long = step % 4 == 3 and step > 0.4 * args.steps
        rows = pack(long, *LONG) if is_long else pack(short, *SHORT)
        params, state, value = step_fn(params, state, rows, step)
        recent.append(float(value))
        if step % 20 == 19:
            seconds = time.perf_counter() - began
            print(f"step {step + 1:5d}  loss {np.mean(recent):.3f}  {seconds:6.0f} s", flush=True)
            recent = []
    return params


# ------------------------------------------------------------------------------------------------- measure and write


def asks(question: str, answer: str, *before: tuple[str, str]) -> Chat:
    turns = [*before, (question, answer)]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def exact(params: Params, cfg: ModelConfig, encoder: Encoder, chats: Sequence[Chat]) -> list[bool]:
    """Whether greedy decoding gives each chat's last answer to the letter, end token included.

    It does exactly when every token of the answer is the likeliest one after the true tokens before it.
    """
    examples = [encoder.chat(chat, only_last=True) for chat in chats]
    length = max(SHORT[1], *(-(-len(example.ids) // 256) * 256 for example in examples))
    count = 8 if length == SHORT[1] else 1
    result: list[bool] = []
    for i in range(0, len(examples), count):
        part = examples[i : i + count]
        rows = Rows(*(np.zeros((count, length), dtype) for dtype in (np.int32, np.float32, np.int32)))
        for row, example in enumerate(part):
            rows.ids[row, : len(example.ids)], rows.weights[row, : len(example.ids)] = example
        result += np.asarray(all_best(params, cfg, rows))[: len(part)].tolist()
    return result


@partial(jax.jit, static_argnames="cfg")
def all_best(params: Params, cfg: ModelConfig, rows: Rows) -> jax.Array:
    """For each row, whether every token that has a weight is the likeliest one there: bool [B]."""
    best = jnp.argmax(scores(params, cfg, rows.ids, rows.segment)[:, :-1], axis=-1)
    return jnp.all((best == rows.ids[:, 1:]) | (rows.weights[:, 1:] == 0), axis=-1)


def evaluate(params: Params, cfg: ModelConfig, encoder: Encoder, seed: int) -> dict[str, float]:
    """The share of exactly right answers, by kind of question; prints the ones that went wrong."""
    rng, facts = random.Random(seed + 1), demo.load_facts()
    suites: dict[str, list[Chat]] = {
        "trained": [asks(q, f.answer) for f in facts for q in rng.sample(questions(f), min(6, len(questions(f))))],
        "held out": [asks(q, f.answer) for f in facts for q in questions(f, held=True)],
        "more": [asks(rng.choice(PHRASES["more"][kind]), f.more, (rng.choice(f.ask), f.answer)) for f in facts
                 for kind in ("trained", "held")],
        "second turn": [asks(q, f.answer, (rng.choice(o.ask), o.answer)) for f in facts for q in f.ask[:2]
                        for o in [rng.choice(facts)]],
        "small talk": [asks(q, talk["answer"]) for talk in PHRASES["small_talk"].values() for q in talk["held"]],
        "off topic": [asks(q, FALLBACK) for q in held_out_off_topic(rng, 60)],
    }  # fmt: skip
    suites["long prompt, more"] = []
    for name, inside in (("long prompt, in the manual", True), ("long prompt, not in it", False)):
        suites[name] = []
        for fact in rng.sample(facts, 20):
            others = rng.sample([f for f in facts if f is not fact], 29)
            system = demo.manual(rng.sample([fact, *others], 30) if inside else others)
            chat = asks(rng.choice([*fact.ask, *fact.held]), fact.answer)
            suites[name].append([{"role": "system", "content": system}, *chat])
            chat = [*chat, *asks(rng.choice(PHRASES["more"]["trained"]), fact.more)]
            suites["long prompt, more"].append([{"role": "system", "content": system}, *chat])
    result = {}
    for name, chats in suites.items():
        right = exact(params, cfg, encoder, chats)
        result[name] = sum(right) / len(right)
        print(f"{name:28s} {sum(right):4d} of {len(right):4d} = {result[name]:.1%}")
        for chat in [chat for chat, fine in zip(chats, right, strict=True) if not fine][:12]:
            print(f"    wrong: {chat[-2]['content']}")
    return result


def write_model(folder: Path, params: Params, cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write the Hugging Face folder: config, bfloat16 safetensors, tokenizer, chat template, generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    pairs = zip(jax.tree.leaves(declare(cfg)), jax.tree.leaves(params), strict=True)
    for spec, array in pairs:
        parts = unpack(spec, np.asarray(array).astype(ml_dtypes.bfloat16))
        tensors |= dict(zip(spec.sources, parts, strict=True))
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    eos = {"bos_token_id": VOCAB - 3, "pad_token_id": VOCAB - 3, "eos_token_id": [VOCAB - 1, VOCAB - 3]}
    names = dict(
        zip(("pad_token", "additional_special_tokens", "eos_token"), (SPECIAL[0], SPECIAL[1:], SPECIAL[2]), strict=True)
    )
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": CONFIG["max_position_embeddings"],
        "add_prefix_space": False,
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(VOCAB - len(SPECIAL) + i): {"content": name, "special": True, "normalized": False, "lstrip": False,
                                            "rstrip": False, "single_word": False}
            for i, name in enumerate(SPECIAL)
        },
        **names,
        "chat_template": TEMPLATE,
    }  # fmt: skip
    sampling = {"do_sample": True, "temperature": 0.2, "repetition_penalty": 1.0}  # a small model rambles at 1
    files = {"config": CONFIG, "generation_config": {**eos, **sampling}, "tokenizer_config": tokenizer_config}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def round_to_bfloat16(params: Params) -> Params:
    """The weights as the folder holds them, in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=demo.path())
    parser.add_argument("--steps", type=int, default=560)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's: embedding, norms and biases")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="Muon's: the matrices of the layers")
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out, train nothing")
    args = parser.parse_args()

    cfg = read_config(CONFIG)
    if args.evaluate:
        from rootcellar.models.loader import load_params

        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        params = load_params(args.out, cfg, jnp.float32)
    else:
        writer = Writer(demo.load_facts(), args.seed)
        tokenizer = train_tokenizer(writer)
        params = round_to_bfloat16(train(args, cfg, writer, Encoder(tokenizer)))
        write_model(args.out, params, cfg, tokenizer)
    evaluate(params, cfg, Encoder(tokenizer), args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
