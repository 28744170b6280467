"""Engines on one store of each kind: what one computed the other hits; its server dies and comes back meanwhile."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.scheduler import Rates

PROMPTS = [[7 * i + j % 300 + 5 for j in range(100)] for i in range(4)]
DEADLINE = 1.0


def engine(**options):
    options = {"max_total_tokens": 2048, "max_running_requests": 4, "random_seed": 1, "model_path": "demo", **options}
    running = rootcellar.Engine(skip_tokenizer_init=True, enable_hierarchical_cache=True, **options)
    # So small a model computes sooner than a slow store loads: let nothing be measured, and all is loaded.
    running._loop.machine.recorder.meter.rates = lambda stats, now: Rates()
    return running


def attach(running, component, settings):
    extra = {**settings, "prefetch_threshold": 16, "deadline": DEADLINE}
    running.attach_storage(component.backend, extra, prefetch_policy="wait_complete")


def ask(running):
    """Tokens of each prompt, and how many of its own came from the store."""
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    began = time.monotonic()
    answers = running.generate(input_ids=PROMPTS, sampling_params=sampling)
    assert time.monotonic() - began < 60
    details = [answer["meta_info"]["cached_tokens_details"]["storage"] for answer in answers]
    return [answer["output_ids"] for answer in answers], details


def settle(running):
    running._loop.call(running._loop.machine.life.settle)


def failures(running):
    calls = running.stats()["copies"]["store"]
    return sum(calls[verb]["failures"] for verb in ("has", "get", "put"))


@pytest.fixture(scope="module")
def expected():
    with engine() as running:
        return ask(running)[0]


def test_what_one_engine_computed_another_hits_at_once_and_after_both_were_restarted(component, expected):
    """On two devices, with another attention backend."""
    settings = component.settings()
    with engine() as first, engine(tp_size=2, attention_backend="xla") as second:
        attach(first, component, settings)
        attach(second, component, settings)
        assert ask(first) == (expected, [0] * 4)
        settle(first)
        tokens, hits = ask(second)
        assert tokens == expected
        assert all(hit >= 80 for hit in hits)
        assert failures(first) == failures(second) == 0
    for options in ({}, {"tp_size": 2}):
        with engine(**options) as again:
            attach(again, component, settings)
            tokens, hits = ask(again)
            assert tokens == expected
            assert all(hit >= 80 for hit in hits)
            assert failures(again) == 0


def test_another_model_dtype_or_other_weights_find_nothing_and_nothing_fails(component, tmp_path):
    """Nor does anything of theirs come to the first, which finds its own."""
    settings = component.settings()
    model = {"model_path": str(make_checkpoint("qwen2", tmp_path / "model"))}
    others = [
        {"model_path": str(make_checkpoint("qwen2", tmp_path / "weights", seed=1))},
        {"model_path": str(make_checkpoint("qwen3", tmp_path / "family"))},
        {**model, "kv_cache_dtype": "bfloat16"},
    ]
    with engine(**model) as first:
        attach(first, component, settings)
        tokens, hits = ask(first)
        assert hits == [0] * 4
        settle(first)
    for options in others:
        with engine(**options) as other:
            alone = ask(other)
            other.flush_cache()
            attach(other, component, settings)
            assert ask(other) == alone
            assert alone[1] == [0] * 4
            assert failures(other) == 0
    with engine(**model) as again:
        attach(again, component, settings)
        found, hits = ask(again)
        assert found == tokens
        assert all(hit >= 80 for hit in hits)


def test_a_server_that_is_killed_in_the_middle_of_puts_and_gets(component, expected, request, record_property):
    """No wrong token, no call beyond its deadline, and the store is used again by itself each time."""
    victim = component.server or component.sidecars
    if victim is None:
        pytest.skip("it has no server that could be killed")
    times, dice = request.config.getoption("--kills"), random.Random(1)

    def kill_after(seconds):
        time.sleep(seconds)
        victim.kill()

    with engine() as running, ThreadPoolExecutor(1) as elsewhere:
        attach(running, component, component.settings())
        assert ask(running)[0] == expected
        longest = 0.0
        for _ in range(times):
            killing = elsewhere.submit(kill_after, dice.uniform(0, 0.1))
            for _ in range(3):
                began = time.monotonic()
                assert ask(running)[0] == expected
                longest = max(longest, time.monotonic() - began)
                settle(running)
                running.flush_cache()
            killing.result()  # whatever kept it from dying is said
            victim.start()
            hits_again(running, expected)
        copies = running.stats()["copies"]
        assert failures(running) > 0
        assert copies["breaker"]["left_alone"] == copies["breaker"]["used_again"] > 0
        assert not copies["breaker"]["away"]
        assert copies["host-storage"]["bytes"] > 0
        assert copies["storage-host"]["bytes"] > 0
        # An answer asks the store and reads from it, a few times where pages lie apart.
        assert longest < 10 * DEADLINE
        said = f"{times} kills: {failures(running)} calls failed, {copies['breaker']}, longest answer {longest:.1f} s"
        record_property("said", said)


def hits_again(running, expected):
    until = time.monotonic() + 120
    while True:
        tokens, hits = ask(running)
        assert tokens == expected
        if all(hit >= 80 for hit in hits):
            return
        assert time.monotonic() < until, "the store is not used again, though its server is there"
        settle(running)
        running.flush_cache()
        time.sleep(0.2)
