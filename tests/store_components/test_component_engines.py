"""Engines on one store of each kind: what one computed the other hits; its server dies and comes back meanwhile."""

import random
import threading
import time

import pytest

import rootcellar
from rootcellar.scheduler import Rates

PROMPTS = [[7 * i + j % 300 + 5 for j in range(100)] for i in range(4)]
DEADLINE = 1.0


def engine(**options):
    options = {"max_total_tokens": 2048, "max_running_requests": 4, "random_seed": 1, **options}
    running = rootcellar.Engine(model_path="demo", enable_hierarchical_cache=True, **options)
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
    calls = running.storage._attached.store.stats()
    return sum(calls[verb].failures for verb in ("has", "get", "put"))


@pytest.fixture(scope="module")
def expected():
    with engine() as running:
        return ask(running)[0]


def test_what_one_engine_computed_another_hits_at_once_and_after_both_were_restarted(component, expected):
    settings = component.settings()
    with engine() as first, engine(attention_backend="xla") as second:
        attach(first, component, settings)
        attach(second, component, settings)
        assert ask(first) == (expected, [0] * 4)
        settle(first)
        tokens, hits = ask(second)
        assert tokens == expected
        assert all(hit >= 80 for hit in hits)
    with engine() as first, engine(kv_cache_dtype="bfloat16") as other:
        attach(first, component, settings)
        attach(other, component, settings)
        tokens, hits = ask(first)
        assert tokens == expected
        assert all(hit >= 80 for hit in hits)
        assert ask(other)[1] == [0] * 4
        assert failures(first) == failures(other) == 0


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.long)])
def test_a_server_that_is_killed_in_the_middle_of_puts_and_gets(component, expected, times):
    """No wrong token, no call beyond its deadline, and the store is used again by itself each time."""
    if component.server is None:
        pytest.skip("it has no server that could be killed")
    dice = random.Random(1)
    with engine() as running:
        attach(running, component, component.settings())
        assert ask(running)[0] == expected
        for _ in range(times):
            late = dice.uniform(0, 0.1)
            killing = threading.Timer(late, component.server.kill)
            killing.start()
            for _ in range(3):
                assert ask(running)[0] == expected
                settle(running)
                running.flush_cache()
            killing.join()
            component.server.start()
            hits_again(running, expected)
        assert failures(running) > 0
        stats = running.stats()["copies"]
        assert stats["host-storage"]["bytes"] > 0
        assert stats["storage-host"]["bytes"] > 0


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
