"""Compiling ahead: what a first request needs at once, the rest while nothing else is to be done."""

import threading
import time

import pytest

import rootcellar
from rootcellar.engine import loop as loops

GREEDY = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}


@pytest.fixture
def engine(tiny_folder):
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=256, chunked_prefill_size=32, max_running_requests=2
    ) as engine:
        yield engine


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_first_request_finds_its_programs_and_the_rest_follows(engine):
    told = []
    engine.programs.first(lambda line: told.append(line) or True)
    assert told[0].startswith("compiling 1 of ")
    assert told[0].endswith(": decoding for 1")
    assert len(told) == int(told[0].split()[3].rstrip(":"))
    before, left = engine.stats()["compilations"], engine.programs.left
    assert left > 0
    for params in (GREEDY, {**GREEDY, "temperature": 1}):
        engine.generate(prompt="a short one", sampling_params=params)
    assert engine.stats()["compilations"] == before
    engine.programs.behind()
    wait_for(lambda: engine.programs.left == 0)
    before = engine.stats()["compilations"]
    engine.generate(prompt=["one and", "another"], sampling_params={**GREEDY, "presence_penalty": 1, "regex": "a+"})
    engine.generate(input_ids=[7] * 60, sampling_params=GREEDY)
    assert engine.stats()["compilations"] == before
    assert engine.warm_up() == 0
    engine.check()


def test_logprobs_compile_nothing_after_warm_up(engine):
    engine.warm_up()
    before = engine.stats()["compilations"]
    for many in (["one"], ["one and", "another " * 12]):
        engine.generate(prompt=many, sampling_params=GREEDY)
        for top in (0, 1, 3, 20):
            for start in (-1, 0, 2):
                found = engine.generate(
                    prompt=many,
                    sampling_params=GREEDY,
                    return_logprob=True,
                    top_logprobs_num=top,
                    logprob_start_len=start,
                )
                assert all(len(each["meta_info"]["output_token_logprobs"]) == 3 for each in found)
    assert engine.stats()["compilations"] == before


def test_whoever_tells_may_stop(engine):
    left = engine.programs.left
    engine.programs.first(lambda line: "compiling 2 of" not in line)
    assert engine.programs.left == left - 1


def test_what_waits_for_an_idle_engine_lets_requests_go_first(engine):
    """One thing at a time: a request that comes meanwhile is answered before the next is begun."""
    loop, order, begun, go = engine._loop, [], threading.Event(), threading.Event()
    engine.generate(prompt="a", sampling_params=GREEDY)  # compiles

    def first():
        begun.set()
        assert go.wait(60)
        order.append("first")

    loop.call(lambda: [loop.when_idle(each) for each in (first, lambda: order.append("second"))])
    assert begun.wait(60)
    thread = threading.Thread(
        target=lambda: engine.generate(prompt="a", sampling_params=GREEDY) and order.append("answer")
    )
    thread.start()
    wait_for(lambda: not loop._inbox.empty())
    go.set()
    thread.join()
    wait_for(lambda: len(order) == 3)
    assert order[0] == "first"
    assert engine.stats()["requests"] == 2


def test_who_asks_again_and_again_is_not_held_up_in_between(engine, monkeypatch):
    """A conversation, or a check of health, is several commands: none of what waits is begun between them."""
    monkeypatch.setattr(loops, "_QUIET", 2.0)  # longer than any machine takes between two of them
    done = threading.Event()
    engine._loop.call(lambda: engine._loop.when_idle(done.set))
    for _ in range(20):
        engine.status()
        assert not done.is_set()
    assert done.wait(60)


def test_nothing_is_computed_while_paused_or_released(engine):
    done = []
    for pause, go_on in (
        (engine.pause_generation, engine.continue_generation),
        (engine.release_memory_occupation, engine.resume_memory_occupation),
    ):
        pause()
        engine._loop.call(lambda: engine._loop.when_idle(lambda: done.append(1)))
        time.sleep(0.1)
        assert not done
        go_on()
        wait_for(lambda: done)
        done.clear()
