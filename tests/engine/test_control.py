"""An engine under way: aborts, deadlines, failures, many callers, its end; and what is compiled by then."""

import asyncio
import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
from idle import check_idle

import rootcellar
from rootcellar.engine.output import Tracker
from rootcellar.errors import EngineError, GenerationFailed
from slowly import slowly

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPT = list(range(5, 45))


def test_abort_gives_what_there_was(engine):
    results, begun = [], threading.Event()
    settings = {**GREEDY, "max_new_tokens": 900}

    def call():
        for part in engine.generate(prompt="hello", sampling_params=settings, rid="mine", stream=True):
            results.append(part)
            begun.set()

    caller = threading.Thread(target=call)
    with slowly(engine):
        caller.start()
        assert begun.wait(60)
        assert engine.abort_request("mine") == 1
    caller.join(timeout=60)
    assert results[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(results[-1]["output_ids"]) < 900
    assert engine.abort_request("mine") == 0


def test_flush_is_refused_while_requests_run(engine):
    with slowly(engine):
        stream = engine.generate(prompt="hello", sampling_params={**GREEDY, "max_new_tokens": 500}, stream=True)
        next(stream)
        with pytest.raises(EngineError, match="1 requests run and 0 wait"):
            engine.flush_cache()
        stream.close()
    engine.flush_cache()


def test_many_callers_at_once(engine):
    alone = [engine.generate(input_ids=[i, i + 1, i + 2], sampling_params=GREEDY)["output_ids"] for i in range(8)]
    results = {}

    def call(i):
        results[i] = engine.generate(input_ids=[i, i + 1, i + 2], sampling_params=GREEDY)["output_ids"]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for c in callers:
        c.start()
    for c in callers:
        c.join(timeout=60)
    assert [results[i] for i in range(8)] == alone


def test_a_deadline_ends_a_request_with_the_reason(tiny_folder):
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=2048, request_timeout=0.2) as engine:
        with slowly(engine):
            result = engine.generate(prompt="hello", sampling_params={**GREEDY, "max_new_tokens": 1500})
        reason = result["meta_info"]["finish_reason"]
        assert reason["type"] == "abort"
        assert "request_timeout" in reason["message"]
        check_idle(engine)


async def collect(engine, **options):
    return [part async for part in await engine.async_generate(**options, stream=True)]


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(engine, monkeypatch):
    expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    runner = engine._parts.runner
    step = runner.step

    def broken(batch, before=None):
        step(batch, before)
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(runner, "step", broken)
    with pytest.raises(GenerationFailed, match=r"1 of 1 answers failed; request .*the device is on fire") as failed:
        engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    assert failed.value.results[0]["meta_info"]["finish_reason"]["cause"] == "failed"
    with pytest.raises(EngineError, match="the device is on fire"):
        list(engine.generate(input_ids=PROMPT, sampling_params=GREEDY, stream=True))
    with pytest.raises(EngineError, match="the device is on fire"):
        asyncio.run(engine.async_generate(input_ids=PROMPT, sampling_params=GREEDY))
    with pytest.raises(EngineError, match="the device is on fire"):
        asyncio.run(collect(engine, input_ids=PROMPT, sampling_params=GREEDY))
    options = {"input_ids": PROMPT, "sampling_params": GREEDY, "raise_on_failure": False}
    results = [engine.generate(**options), asyncio.run(engine.async_generate(**options))]
    results += [list(engine.generate(**options, stream=True))[-1], asyncio.run(collect(engine, **options))[-1]]
    for result in results:
        assert "the device is on fire" in result["meta_info"]["finish_reason"]["message"]
        assert result["output_ids"] == []
    monkeypatch.setattr(runner, "step", step)
    again = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    assert again["output_ids"] == expected
    assert again["meta_info"]["cached_tokens"] == 0  # nothing from before the failure is trusted


def test_output_that_cannot_be_made_ends_its_request_alone(engine, monkeypatch):
    """One of two requests meets a tokenizer that fails; the other gets its answer, and no caller waits for ever."""
    expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    take = Tracker.take_token

    def broken(tracker, version, now):
        if tracker.request.rid == "cursed" and tracker.request.generated > 3:
            raise ValueError("no such character")
        return take(tracker, version, now)

    monkeypatch.setattr(Tracker, "take_token", broken)
    with pytest.raises(GenerationFailed, match=r"1 of 2 answers failed; request 'cursed': .*no such char") as failed:
        engine.generate(input_ids=[[3, 4], PROMPT], rid=["cursed", "other"], sampling_params=GREEDY)
    cursed, other = failed.value.results
    assert "no such character" in cursed["meta_info"]["finish_reason"]["message"]
    assert other["output_ids"] == expected


def test_a_final_update_that_fails_is_still_an_end(engine, monkeypatch):
    def broken(tracker):
        raise ValueError("no such character")

    monkeypatch.setattr(Tracker, "close", broken)
    result = engine.generate(input_ids=PROMPT, sampling_params=GREEDY, raise_on_failure=False)
    assert "no such character" in result["meta_info"]["finish_reason"]["message"]


def test_an_engine_that_cannot_recover_stops_and_leaves_nobody_waiting(tiny_folder, monkeypatch):
    engine = rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256)

    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine._parts.runner, "step", broken)
    monkeypatch.setattr(engine._loop.machine, "recover", broken)
    with pytest.raises(GenerationFailed, match="shut down"):
        engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    with pytest.raises(EngineError, match="shut down"):
        engine.generate(input_ids=PROMPT)
    engine.shutdown()


def test_shutdown_twice_and_then_no_more(tiny_folder):
    engine = rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256)
    with slowly(engine):
        stream = engine.generate(prompt="hello", sampling_params={**GREEDY, "max_new_tokens": 200}, stream=True)
        next(stream)
        engine.shutdown()
        engine.shutdown()
    with pytest.raises(GenerationFailed, match="shut down"):
        list(stream)
    for call in (lambda: engine.generate(prompt="hello"), engine.flush_cache, engine.stats):
        with pytest.raises(EngineError, match="shut down"):
            call()


def test_no_compilation_in_steady_state(tiny_folder):
    """After warm-up a mixed workload compiles nothing: all batch sizes, chunks, samplers, retraction and eviction."""
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=1024, max_running_requests=4, chunked_prefill_size=64
    ) as engine:
        assert engine.warm_up() > 0
        before = engine.stats()["compilations"]
        rng = np.random.default_rng(0)
        settings = [
            GREEDY,
            {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "max_new_tokens": 30},
            {"temperature": 1.0, "presence_penalty": 1.0, "max_new_tokens": 7, "min_p": 0.1},
            {"min_new_tokens": 5, "max_new_tokens": 60, "repetition_penalty": 1.2},
        ]
        for _ in range(4):
            n = int(rng.integers(1, 14))
            prompts = [rng.integers(0, 500, int(rng.integers(1, 300))).tolist() for _ in range(n)]
            engine.generate(input_ids=prompts, sampling_params=[settings[int(rng.integers(4))] for _ in range(n)])
        stats = engine.stats()
        assert stats["compilations"] == before
        assert stats["retractions"] + stats["cache"]["full"]["DEVICE"]["evicted"] > 0
        check_idle(engine)


# --- the end of an engine that nobody closed --------------------------------------------------------------------------

AT_EXIT = """
import atexit, sys, threading
sys.path[:0] = sys.argv[2:]
last = []  # registered before anything of ours: it runs after it
atexit.register(lambda: print(*[t.name for t in threading.enumerate()], *[pool.free() for pool in last[0].values()]))
import rootcellar

def main():
    engine = rootcellar.Engine(model_path=sys.argv[1], max_total_tokens=256, skip_tokenizer_init=True)
    last.append(engine._parts.runner.pools)
    stream = engine.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 100, "ignore_eos": True}, stream=True)
    next(stream)
    reader = threading.Thread(target=lambda: engine.generate(input_ids=[3], sampling_params={"max_new_tokens": 200}))
    threading.excepthook = lambda _: None  # its answers fail, as they must
    reader.daemon = True
    reader.start()
    raise ValueError("the user's own")

main()
"""


def test_an_engine_that_was_not_closed_ends_with_the_program_and_says_nothing(tiny_folder):
    done = subprocess.run([sys.executable, "-c", AT_EXIT, tiny_folder], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: the user's own\n"), done.stderr
    assert "rootcellar-engine" not in done.stdout
    assert done.stdout.split()[0] == "MainThread"
    assert done.stdout.endswith(" 0\n"), done.stdout  # the KV cache's memory was given back


def test_an_engine_that_nobody_refers_to_stops(tiny_folder):
    engine = rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256)
    thread, pools = engine._loop._thread, engine._parts.runner.pools
    del engine
    gc.collect()
    assert not thread.is_alive()
    assert not any(pool.free() for pool in pools.values())
