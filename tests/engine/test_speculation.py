"""Guessing ahead changes no answer: tokens, logprobs, texts and reasons are those of one token a step."""

from collections import Counter
from itertools import product

import jax
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from checkpoints import golden
from guesses import Knowing
from rootcellar.config import EngineConfig
from rootcellar.errors import ConfigError
from rootcellar.runner.sampler import Sampled, build, sample
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import keep

PROMPTS = [[(i * 7 + seed * 13) % 500 for i in range(9 + 5 * seed)] for seed in range(4)]
OPTIONS = {"max_total_tokens": 1024, "max_running_requests": 4, "chunked_prefill_size": 64}


@pytest.fixture(scope="module")
def guessing_engine(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, speculative_algorithm="ngram", speculative_num_draft_tokens=15, **OPTIONS
    ) as engine:
        engine.warm_up()
        yield engine


def both(plain, guessing, prompts=PROMPTS, **options):
    """What both engines answer; the second guesses what the first said."""
    first = plain.generate(input_ids=prompts, **options)
    guesses = Knowing(16)
    guesses.answers = {tuple(p): r["output_ids"] for p, r in zip(prompts, first, strict=True)}
    scheduler = guessing._parts.scheduler
    kept, scheduler.guesses = scheduler.guesses, guesses
    compiled = guessing.stats()["compilations"]
    try:
        second = guessing.generate(input_ids=prompts, **options)
    finally:
        scheduler.guesses = kept
    guesses.compiled = guessing.stats()["compilations"] - compiled
    check_idle(guessing)
    return first, second, guesses


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 5, "top_p": 0.95},
        {"temperature": 0, "presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"temperature": 0.8, "seed": 9, "min_new_tokens": 12, "logit_bias": {"7": 2.0}},
    ],
    ids=["greedy", "drawn", "penalized", "biased"],
)
def test_guesses_change_no_token_and_no_logprob(tiny_engine, guessing_engine, sampling):
    options = {"sampling_params": {"max_new_tokens": 24, "ignore_eos": "min_new_tokens" not in sampling, **sampling}}
    first, second, guesses = both(tiny_engine, guessing_engine, **options, return_logprob=True, top_logprobs_num=2)
    for one, other in zip(first, second, strict=True):
        assert one["output_ids"] == other["output_ids"]
        assert one["text"] == other["text"]
        ours, theirs = (r["meta_info"] for r in (other, one))
        assert ours["finish_reason"] == theirs["finish_reason"]
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert flat(ours[name]) == pytest.approx(flat(theirs[name]), abs=1e-3)
        assert ours["spec_verify_ct"] < len(other["output_ids"])
        assert ours["spec_accept_length"] > 1
        assert "spec_verify_ct" not in theirs
    assert 0 < guesses.right < guesses.guessed
    assert guesses.compiled == 0, "all shapes were warm"


def flat(logprobs):
    """Values and ids of logprobs or of lists of them."""
    return [each for entry in logprobs for each in (flat(entry) if isinstance(entry, list) else entry[:2])]


def test_stop_strings_end_an_answer_in_the_middle_of_a_guess(tiny_engine, guessing_engine):
    (said, *_) = tiny_engine.generate(
        input_ids=PROMPTS, sampling_params={"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    )
    stop = said["text"][len(said["text"]) // 2 :][:3]
    first, second, _ = both(
        tiny_engine, guessing_engine, sampling_params={"max_new_tokens": 24, "temperature": 0, "stop": stop}
    )
    assert first[0]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    for one, other in zip(first, second, strict=True):
        assert (one["text"], one["output_ids"]) == (other["text"], other["output_ids"])
        assert one["meta_info"]["finish_reason"] == other["meta_info"]["finish_reason"]


def test_what_repeats_is_guessed_and_counted(tiny_engine, guessing_engine):
    """What it said before it says again."""
    sampling = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
    guessing_engine.generate(input_ids=PROMPTS[0], sampling_params=sampling)
    before = guessing_engine.stats()
    result = guessing_engine.generate(input_ids=PROMPTS[0], sampling_params=sampling)
    assert result["output_ids"] == tiny_engine.generate(input_ids=PROMPTS[0], sampling_params=sampling)["output_ids"]
    meta, after = result["meta_info"], guessing_engine.stats()
    assert meta["spec_draft_token_num"] > 0
    assert 199 <= meta["spec_verify_ct"] + meta["spec_accept_token_num"] <= 200 + 15, "the first came with the prompt"
    for ours, theirs in (
        ("spec_draft_tokens", "spec_draft_token_num"),
        ("spec_accepted_tokens", "spec_accept_token_num"),
    ):
        assert after[ours] - before[ours] == meta[theirs]
    assert after["spec_verify_ct"] - before["spec_verify_ct"] == meta["spec_verify_ct"]


@pytest.mark.parametrize("name", ["gemma3", "llama4", "deepseek3", "mistral-window"])
def test_windows_chunks_and_latents_verify_guesses(name, tmp_path):
    case, guesses, new = golden(name), Knowing(16), 24
    options = OPTIONS | {"page_size": 4, "speculative_algorithm": "ngram", "skip_tokenizer_init": True}
    with rootcellar.Engine(model_path=case.make(tmp_path), **options) as engine:
        guesses.answers = {tuple(p): list(t[:new]) for p, t in zip(case.prompts, case.tokens, strict=True)}
        engine._parts.scheduler.guesses = guesses
        sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        for prompts in (case.prompts[:1], case.prompts[:4]):
            results = engine.generate(input_ids=prompts, sampling_params=sampling)
            assert [r["output_ids"] for r in results] == [list(t[:new]) for t in case.tokens[: len(prompts)]]
        check_idle(engine)
    assert 0 < guesses.right < guesses.guessed


def test_drawn_tokens_have_the_models_distribution():
    """The frequencies of pairs of drawn tokens, where one that is often wrong is guessed for the first."""
    vocab, rows = 5, 20_000
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1 + vocab, vocab)).astype(np.float32) * 1.5  # after nothing, and after each token
    guess = int(logits[0].argmax())
    params, empty = SamplingParams(temperature=1.0), np.zeros(0, np.int64)

    def drawn(at, after):
        settings = build([Sampled(params, seed, at, (), empty, empty) for seed in range(rows)], rows, vocab)
        return np.asarray(jax.jit(sample)(logits[after], settings)[0])

    first = drawn(10, np.zeros(rows, np.int64))
    behind_the_guess = drawn(11, np.full(rows, 1 + guess))
    kept = [keep((guess,), pair) for pair in zip(first.tolist(), behind_the_guess.tolist(), strict=True)]
    alone = drawn(11, 1 + first)  # for those whose guess was wrong, the step after
    pairs = Counter((k[0], k[1] if len(k) > 1 else int(a)) for k, a in zip(kept, alone, strict=True))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chi = sum(
        (pairs[x, y] - rows * p[0, x] * p[1 + x, y]) ** 2 / (rows * p[0, x] * p[1 + x, y])
        for x, y in product(range(vocab), repeat=2)
    )
    assert chi < 51.2, "24 degrees of freedom: one in a thousand lies above"
    assert 0.02 < np.mean([len(k) > 1 for k in kept]) < 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm"),
        ({"speculative_algorithm": "ngram", "nnodes": 2, "tp_size": 2, "dist_init_addr": "h:1"}, "nnodes"),
        (
            {"speculative_ngram_min_match_window_size": 9, "speculative_ngram_max_match_window_size": 8},
            "min_match_window_size=9",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_kwargs(**options)
