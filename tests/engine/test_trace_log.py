"""A live engine writes what was asked; replayed, it hits as much as the engine did, and says nothing of the text."""

import json
import os
import random
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

import rootcellar
from rootcellar.engine.trace_log import TraceLine, TraceLog
from rootcellar.errors import ConfigError
from rootcellar.sim.replay import replay
from rootcellar.sim.trace import parse


def workload(seed):
    """Conversations below a few system prompts, in turns, in two namespaces; some are asked again."""
    rng = random.Random(seed)

    def fresh(count):
        return [rng.randrange(500) for _ in range(count)]

    systems = [fresh(rng.randint(20, 60)) for _ in range(3)]
    chats = [[rng.choice(systems) + fresh(rng.randint(3, 40)), rng.choice(["", "x"])] for _ in range(8)]
    for _ in range(50):
        chat = rng.choice(chats)
        answer = yield chat[0], chat[1]
        chat[0] = chat[0] + answer + fresh(rng.randint(2, 20))
        if len(chat[0]) > 220:
            chat[0] = rng.choice(systems) + fresh(rng.randint(3, 40))


def test_a_recorded_trace_replays_to_the_same_hit_rate_and_holds_no_text(tiny_folder, tmp_path):
    path = tmp_path / "trace.jsonl"
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=768, max_running_requests=4, chunked_prefill_size=64, record_trace=path
    ) as engine:
        asked = workload(3)
        prompt, salt = next(asked)
        for _ in range(49):
            sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
            result = engine.generate(input_ids=prompt, sampling_params=sampling, extra_key=salt)
            prompt, salt = asked.send(result["output_ids"])
        stats = engine.stats()
    live = stats["cached_tokens"] / stats["prompt_tokens"]
    assert stats["cache"]["full"]["DEVICE"]["evicted"] > 0
    text = path.read_text()
    requests, bad = parse(text.splitlines(), block=16)
    assert (len(requests), bad) == (49, [])
    outcome = replay(requests, capacity=768, page_size=16, block=16)
    assert outcome.hit_rate == pytest.approx(live, abs=0.005)
    assert 0.2 < live < 0.9
    for line in map(json.loads, text.splitlines()):
        assert set(line) == {"timestamp", "input_length", "output_length", "hash_ids", "output_hash_ids"}
        assert all(each >= 1 << 20 for each in line["hash_ids"] + line["output_hash_ids"]), "no token ids"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def lines_of(path, *asked, block=4):
    log = TraceLog(str(path), block)
    for each in asked:
        log.ended(each)
    log.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(ids, prompt, namespace="", at=1.0):
    return TraceLine(at, np.asarray(ids, np.int64), prompt, namespace)


def test_equal_beginnings_have_equal_ids_within_one_run_and_namespace(tmp_path):
    one, other, elsewhere = lines_of(
        tmp_path / "a",
        asked([1, 2, 3, 4, 5, 6, 7], 6),
        asked([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], 8),
        asked([1, 2, 3, 4, 5, 6, 7], 6, "x"),
    )
    assert one["hash_ids"][0] == other["hash_ids"][0]
    assert one["hash_ids"][1] != other["hash_ids"][1], "the block was not whole"
    assert one["output_hash_ids"] == one["hash_ids"][1:], "the newest token is not cached"
    assert len(other["output_hash_ids"]) == 1
    assert not set(elsewhere["hash_ids"]) & set(one["hash_ids"])
    (again,) = lines_of(tmp_path / "b", asked([1, 2, 3, 4, 5, 6, 7], 6))
    assert again["hash_ids"] != one["hash_ids"], "another run has another key"


def test_a_trace_grows_and_one_that_cannot_be_written_is_refused(tmp_path):
    lines_of(tmp_path / "a", asked([1, 2], 2))
    assert len(lines_of(tmp_path / "a", asked([1, 2], 2, at=2.5))) == 2
    with pytest.raises(ConfigError, match="record_trace"):
        TraceLog(str(tmp_path / "none" / "a"), 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("when", ["while it is written", "at its end"])
def test_a_disk_that_is_full_ends_a_trace_and_holds_up_nobody(when, monkeypatch):
    log, gate = TraceLog("/dev/full", 4), threading.Event()
    monkeypatch.setattr(log, "_line", lambda _: {"waited": gate.wait(60)})
    log.ended(asked([1, 2], 2))
    if when == "at its end":
        log._queue.put(None)
    gate.set()
    if when == "while it is written":
        log.close()
    log._thread.join(10)
    assert not log._thread.is_alive()


def test_a_pipe_that_nobody_reads_is_refused_and_what_nobody_asked_is_an_empty_trace(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="record_trace"):
        TraceLog(str(tmp_path / "pipe"), 4)
    assert lines_of(tmp_path / "a") == []
