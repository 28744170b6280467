"""Hybrid models with recurrent layers in the engine: the tokens of transformers, whatever becomes of the states."""

import random

import numpy as np
import pytest
from idle import check_idle

import rootcellar
from checkpoints import golden
from guesses import Knowing

NEW = 24
GREEDY = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}


@pytest.fixture
def make(tmp_path):
    def make(name):
        case = golden(name)
        case.make(tmp_path)
        return case, tmp_path

    return make


def engine(folder, **options):
    options = {"max_total_tokens": 8192, "max_running_requests": 2, "max_mamba_cache_size": 40, **options}
    options["skip_tokenizer_init"] = True
    return rootcellar.Engine(model_path=folder, **options)


def shelf(engine, kind="recurrent"):
    return engine.stats()["cache"][kind]["DEVICE"]


def serve(engine, case, batch, which=range(16)):
    """Prompts in a shuffled order, ``batch`` at a time: what they must answer, and what of each was cached."""
    order = list(which)
    random.Random(batch).shuffle(order)
    cached = {}
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        answers = engine.generate(input_ids=[case.prompts[i] for i in part], sampling_params=GREEDY)
        for i, answer in zip(part, answers, strict=True):
            assert answer["output_ids"] == case.tokens[i][:NEW], f"prompt {i}"
            cached[i] = answer["meta_info"]["cached_tokens"]
    return cached


def evict_states(engine, vocab):
    """Let other requests push every state out; keys and values all stay."""
    before, full = shelf(engine), shelf(engine, "full")
    rng = np.random.default_rng(7)
    others = [rng.integers(0, vocab, 33).tolist() for _ in range(before["size"])]
    for at in range(0, len(others), 16):
        engine.generate(input_ids=others[at : at + 16], sampling_params={"temperature": 0, "max_new_tokens": 1})
    assert shelf(engine)["evicted"] - before["evicted"] >= before["cached"]
    assert shelf(engine, "full")["evicted"] == full["evicted"]
    assert shelf(engine, "full")["cached"] > full["cached"]


def drop_and_rebuild(engine, case):
    """States wait on the host and are hits again; without ``preserve`` they are gone. Nothing compiles."""
    longest = case.prompts[-1]
    for preserve in (True, False):
        (before,) = engine.generate(input_ids=[longest], sampling_params=GREEDY)
        engine.release_memory_occupation("kv_cache", preserve=preserve)
        engine.resume_memory_occupation("kv_cache")
        compiled = engine.stats()["compilations"]
        (answer,) = engine.generate(input_ids=[longest], sampling_params=GREEDY)
        assert before["output_ids"] == answer["output_ids"] == case.tokens[-1][:NEW]
        assert (answer["meta_info"]["cached_tokens"] >= 96) == preserve
        assert engine.stats()["compilations"] == compiled


def retract(engine, case):
    """Requests that lose their states in the middle of their answers go on with the same tokens."""
    sampling = {**GREEDY, "max_new_tokens": 64}
    last = {}
    for seen, answer in enumerate(engine.generate(input_ids=case.prompts[-4:], sampling_params=sampling, stream=True)):
        last[answer["index"]] = answer["output_ids"]
        if seen == 40:
            engine.pause_generation("retract")
            engine.continue_generation()
    assert engine.stats()["retractions"] > 0
    assert [last[i] for i in range(4)] == case.tokens[-4:]


def draws_the_same(engine, case, guesses):
    """Drawn tokens are the same whether any of them were guessed: so they have the same distribution."""
    prompts, guesses.answers = case.prompts[::5], {}
    sampling = {"temperature": 1.0, "seed": 5, "max_new_tokens": NEW, "ignore_eos": True}
    alone = [answer["output_ids"] for answer in engine.generate(input_ids=prompts, sampling_params=sampling)]
    right, guesses.answers = guesses.right, {tuple(p): t for p, t in zip(prompts, alone, strict=True)}
    assert [a["output_ids"] for a in engine.generate(input_ids=prompts, sampling_params=sampling)] == alone
    assert guesses.right > right


@pytest.mark.parametrize(
    ("name", "page_size", "chunk", "batches", "running"),
    [
        ("bamba", 16, 64, [1], 2),
        ("qwen3-next", 1, 16, [16], 2),
        pytest.param("bamba", 16, 256, [16, 1], 16, marks=pytest.mark.long),
        pytest.param("bamba", 1, 16, [16], 16, marks=pytest.mark.long),
        pytest.param("qwen3-next", 1, 16, [16, 1], 16, marks=pytest.mark.long),
        pytest.param("qwen3-next", 16, 16, [16, 1], 16, marks=pytest.mark.long),
        pytest.param("qwen3-next", 1, 256, [16, 1], 16, marks=pytest.mark.long),
        pytest.param("bamba", 1, 256, [1], 16, marks=pytest.mark.long),
    ],
)
def test_the_same_tokens_cold_cached_and_without_the_states(make, name, page_size, chunk, batches, running):
    """Where few may run at once, with a quarter of the prompts."""
    case, folder = make(name)
    which = range(16) if running == 16 else range(3, 16, 4)
    with engine(folder, page_size=page_size, chunked_prefill_size=chunk, max_running_requests=running) as e:
        for batch in batches:
            serve(e, case, batch, which)
            again = serve(e, case, batch, which)
            for i, cached in again.items():
                if len(case.prompts[i]) > 33 + page_size:  # a state at its tail, or where another parted from it
                    assert cached > 0
            assert max(again.values()) >= 96
            evict_states(e, 512)
            assert serve(e, case, batch, which) != again, "without states, prompts are computed again"
            e.flush_cache()
        drop_and_rebuild(e, case)
        retract(e, case)
        check_idle(e)


@pytest.mark.parametrize(
    ("name", "page_size", "chunk", "batch", "running"),
    [
        ("bamba", 16, 64, 16, 2),
        ("qwen3-next", 1, 16, 1, 2),
        pytest.param("bamba", 1, 16, 16, 16, marks=pytest.mark.long),
        pytest.param("qwen3-next", 16, 256, 16, 16, marks=pytest.mark.long),
    ],
)
def test_the_same_tokens_where_they_are_guessed(make, name, page_size, chunk, batch, running):
    """Of each guess so much is kept as is right, and so is the state; what is left in the cache is of nothing else."""
    case, folder = make(name)
    which = range(16) if running == 16 else range(3, 16, 4)
    guesses = Knowing(max(8, running))
    guesses.answers = {tuple(p): list(t) for p, t in zip(case.prompts, case.tokens, strict=True)}
    options = {"page_size": page_size, "chunked_prefill_size": chunk, "max_running_requests": running}
    options |= {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 7, "mamba_track_interval": 16}
    with engine(folder, **options) as e:
        e._parts.scheduler.guesses = guesses
        serve(e, case, batch, which)
        again = serve(e, case, batch, which)
        assert max(again.values()) >= 96
        resumed = []
        for i in which:  # a turn later: from a state that was left in the midst of an answer
            said = case.tokens[i][: NEW - 1]
            prompt = [*case.prompts[i], *said]
            guesses.answers[tuple(prompt)] = case.tokens[i][NEW - 1 :]
            (answer,) = e.generate(input_ids=[prompt], sampling_params=GREEDY)
            assert answer["output_ids"] == case.tokens[i][NEW - 1 :][:NEW]
            resumed.append(answer["meta_info"]["cached_tokens"] - len(case.prompts[i]))
        assert max(resumed) > 0, "decoding left states"
        drop_and_rebuild(e, case)
        retract(e, case)
        draws_the_same(e, case, guesses)
        check_idle(e)
    assert 0 < guesses.right < guesses.guessed


@pytest.mark.parametrize(
    ("name", "page_size", "chunk"),
    [("bamba", 16, 64), pytest.param("qwen3-next", 1, 16, marks=pytest.mark.long)],
)
def test_the_same_tokens_with_the_cache_off(make, name, page_size, chunk):
    case, folder = make(name)
    with engine(folder, page_size=page_size, chunked_prefill_size=chunk, disable_radix_cache=True) as e:
        assert not any(serve(e, case, 16).values())
        check_idle(e)
