"""Hybrid models with recurrent layers in the engine: the tokens of transformers, whatever becomes of the states."""

import random

import numpy as np
import pytest

import rootcellar
from checkpoints import golden

CASES = ["bamba", "qwen3-next"]
NEW = 24
GREEDY = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    case = golden(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    case.make(folder)
    return case, folder


def engine(folder, **options):
    options = {"max_total_tokens": 8192, "max_running_requests": 16, "max_mamba_cache_size": 40, **options}
    options["skip_tokenizer_init"] = True
    return rootcellar.Engine(model_path=folder, **options)


def shelf(engine, kind="recurrent"):
    return engine.stats()["cache"][kind]["DEVICE"]


def serve(engine, case, batch):
    """All prompts in a shuffled order, ``batch`` at a time: what they must answer, and what of them was cached."""
    order = list(range(len(case.prompts)))
    random.Random(batch).shuffle(order)
    cached = [0] * len(order)
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


def check_idle(engine):
    """When idle, free and cached make up everything; after a flush everything is free."""
    engine.check()
    for kind in ("full", "recurrent"):
        found = shelf(engine, kind)
        assert found["free"] + found["cached"] == found["size"]
        assert found["pinned"] == found["leased"] == 0
    engine.flush_cache()
    assert shelf(engine)["free"] == shelf(engine)["size"]


@pytest.mark.parametrize(("page_size", "chunk", "batches"), [(1, 16, [16]), (16, 256, [16, 1])])
def test_the_same_tokens_cold_cached_and_without_the_states(case, page_size, chunk, batches):
    case, folder = case
    with engine(folder, page_size=page_size, chunked_prefill_size=chunk) as e:
        for batch in batches:
            serve(e, case, batch)
            again = serve(e, case, batch)
            for prompt, cached in zip(case.prompts, again, strict=True):
                if len(prompt) > 33 + page_size:  # a state at the tail of the prompt, or where another parted from it
                    assert cached > 0
            assert max(again) >= 96
            evict_states(e, 512)
            assert serve(e, case, batch) != again, "without states, prompts are computed again"
            check_idle(e)


def test_the_same_tokens_with_the_cache_off(case):
    case, folder = case
    with engine(folder, page_size=16, chunked_prefill_size=256, disable_radix_cache=True) as e:
        assert serve(e, case, 16) == [0] * 16
        check_idle(e)
