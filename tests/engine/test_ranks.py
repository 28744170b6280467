"""One engine of two processes: the answers of transformers, tiers behind both, and what happens when one is lost."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from idle import always_load

import rootcellar
from serving import Server, wait_until

SCRIPT = Path(__file__).with_name("rank.py")
MOST = 12
"""Tokens of an answer."""


def free_address():
    """Where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


class Pair:
    """Two processes, each to be one rank of engines."""

    def __init__(self, folder):
        address = free_address()
        self.errors = [folder / f"rank{rank}" for rank in range(2)]
        self.processes = []
        for rank, said in enumerate(self.errors):
            with said.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, SCRIPT, str(rank), "2", address],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                    )
                )  # fmt: skip

    def send(self, rank, name, **arguments):
        self.processes[rank].stdin.write(json.dumps([name, arguments]) + "\n")
        self.processes[rank].stdin.flush()

    def answer(self, rank):
        line = self.processes[rank].stdout.readline()
        assert line, self.errors[rank].read_text()[-3000:]
        return json.loads(line)

    def ask(self, rank, name, **arguments):
        """What a function of a rank gives."""
        self.send(rank, name, **arguments)
        well, result = self.answer(rank)
        assert well, result
        return result

    def both(self, name, *own, **arguments):
        """The same on both ranks at once; ``own``: what is one rank's own."""
        for rank in range(2):
            self.send(rank, name, **arguments, **(own[rank] if own else {}))
        return [self.answer(rank) for rank in range(2)]

    def close(self):
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("ranks"))
    yield pair
    pair.close()


@pytest.fixture
def doomed(tmp_path):
    """A pair that does not survive its test."""
    pair = Pair(tmp_path)
    yield pair
    for process in pair.processes:
        process.send_signal(signal.SIGCONT)
    pair.close()


def settings(folder, **options):
    small = {"max_total_tokens": 1024, "chunked_prefill_size": 32, "max_running_requests": 2}
    return {"model_path": str(folder), "skip_tokenizer_init": True, **small, **options}


def store_in(path, backend="file"):
    """The settings of host memory with a store behind it."""
    extra = {"path": str(path), "max_size": "64MiB", "min_free_space": 0, "prefetch_threshold": 16}
    return {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": backend,
        "hicache_storage_backend_extra_config": json.dumps(extra),
        "hicache_storage_prefetch_policy": "wait_complete",
    }


def started(pair, *own, **options):
    """The engine starts on both; what they say of their devices."""
    found = pair.both("start", *own, **options)
    assert all(well for well, _ in found), found
    return [result for _, result in found]


def answers(pair, case, some):
    """The answers to some of the prompts, which must be those of transformers; where the prompts were found."""
    result = pair.ask(0, "generate", prompts=[case.prompts[i] for i in some], most=MOST)
    assert result["output_ids"] == [case.tokens[i][:MOST] for i in some]
    return result["found"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("qwen2-4kv", [4, 2]),
        *(
            pytest.param(name, None, marks=pytest.mark.long)
            for name in ("qwen3-tied-1kv-d128", "gemma3", "llama4", "deepseek3", "bamba", "qwen3-next", "gpt-oss")
        ),
    ],
)
def test_two_processes_answer_as_one_and_share_its_store(pair, case_of, tmp_path, name, heads):
    """What two ranks wrote one process reads, and back; each rank has the whole image of a page."""
    case, folder = case_of(name)
    # Of windowed and recurrent layers what is kept depends on where requests end: then the answers alone must be equal.
    found_again = name in ("qwen2-4kv", "qwen3-tied-1kv-d128", "deepseek3")
    store = store_in(tmp_path / "pages")
    found = started(pair, **settings(folder, **store))
    assert [each["devices"] for each in found] == [[2, 1], [2, 1]]
    assert heads is None or [each["heads"] for each in found] == [heads, heads]
    assert [each["storage"] for each in answers(pair, case, [11, 13])] == [0, 0]
    assert all(each["device"] for each in answers(pair, case, [11, 13]))
    pair.ask(0, "call", method="flush_cache")
    assert all(each["storage"] for each in answers(pair, case, [11, 13])) or not found_again
    stop(pair)

    with rootcellar.Engine(**settings(folder, **store)) as engine:
        always_load(engine)
        options = {"temperature": 0, "max_new_tokens": MOST, "ignore_eos": True}
        results = engine.generate(input_ids=[case.prompts[i] for i in (11, 13)], sampling_params=options)
        results += engine.generate(input_ids=[case.prompts[14]], sampling_params=options)
        engine.flush_cache()  # once all is written down
        assert [r["output_ids"] for r in results] == [case.tokens[i][:MOST] for i in (11, 13, 14)]
        there = [r["meta_info"]["cached_tokens_details"]["storage"] > 0 for r in results]
    assert there == [True, True, False] or not found_again

    started(pair, **settings(folder, **store))
    assert answers(pair, case, [14])[0]["storage"] > 0 or not found_again
    stop(pair)


def stop(pair):
    """The engine ends, rank 0 first."""
    for rank in range(2):
        pair.ask(rank, "stop")


def test_ranks_with_stores_of_their_own_the_least_counts_and_a_slow_rank_is_waited_for(pair, case_of, tmp_path):
    case, folder = case_of("qwen2-4kv")
    own = [store_in(tmp_path / f"rank{rank}") for rank in range(2)]
    started(pair, *own, **settings(folder))
    pair.ask(1, "slow", seconds=0.003)
    assert [each["storage"] for each in answers(pair, case, [11, 13])] == [0, 0]
    pair.ask(0, "call", method="flush_cache")
    assert all(each["storage"] for each in answers(pair, case, [11, 13]))
    seconds = pair.ask(0, "agreements", count=200)
    assert seconds < 0.02  # a fraction of a millisecond where nobody else computes
    stop(pair)
    shutil.rmtree(tmp_path / "rank1")  # what rank 0 has alone is as good as nothing
    started(pair, *own, **settings(folder))
    assert [each["storage"] for each in answers(pair, case, [11, 13])] == [0, 0]
    stop(pair)


@pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=pytest.mark.long)])
def test_a_rank_whose_store_fails_costs_hits_and_nothing_else(pair, case_of, tmp_path, rounds):
    case, folder = case_of("qwen2-4kv")
    own = [store_in(tmp_path / "rank0"), store_in(tmp_path / "rank1", "faulty")]
    started(pair, *own, **settings(folder, max_total_tokens=192))
    for i in range(rounds):
        answers(pair, case, [3 + i % 3, 11, 13, 14])
        if i % 4 == 0:
            pair.ask(0, "call", method="flush_cache")
    pair.ask(0, "call", method="check")
    stop(pair)


def test_ranks_that_are_not_alike_do_not_start(pair, case_of):
    _, folder = case_of("qwen2-4kv")
    for well, said in pair.both("start", {"page_size": 16}, {"page_size": 8}, **settings(folder)):
        assert not well
        assert "page_size is 16 on rank 0 and 8 on rank 1" in said


def test_a_rank_that_follows_refuses_callers_and_ends_with_rank_0(pair, case_of):
    case, folder = case_of("qwen2-4kv")
    started(pair, **settings(folder))
    pair.send(1, "generate", prompts=[[1]], most=1)
    well, said = pair.answer(1)
    assert not well
    assert "ask that one" in said
    answers(pair, case, [11])
    assert pair.ask(1, "stats")["steps"] == pair.ask(0, "stats")["steps"]
    pair.ask(0, "call", method="update_weights_from_disk", model_path=str(folder))
    answers(pair, case, [11])
    pair.ask(0, "call", method="release_memory_occupation", preserve=True)
    pair.ask(0, "call", method="resume_memory_occupation")
    answers(pair, case, [11])
    pair.ask(0, "stop")
    pair.ask(1, "call", method="follow")  # which returns, since rank 0 was told to end
    pair.ask(1, "stop")


def test_grammars_stop_strings_and_draws_are_the_same_on_all_ranks(pair, tiny_folder):
    options = {**settings(tiny_folder), "skip_tokenizer_init": False}
    started(pair, **options)
    words = ["page", "lease"]
    sampling = {"json_schema": json.dumps({"enum": words}), "temperature": 1, "seed": 3, "max_new_tokens": 32}
    found = pair.ask(0, "call", method="generate", prompt=["Say"] * 2, sampling_params=sampling)
    assert all(json.loads(each["text"]) in words for each in found)
    free = {"temperature": 1.2, "top_p": 0.9, "frequency_penalty": 0.5, "max_new_tokens": 24, "ignore_eos": True}
    stopped = {**free, "stop": ["a", "e"], "seed": 1}
    pair.ask(0, "call", method="generate", prompt=["Say", "it"], sampling_params=[free, stopped], return_logprob=True)
    stop(pair)  # ranks that had parted would have said so


LOST = {
    "killed": (signal.SIGKILL, 30, "rank {} of 2 is lost: its connection ended"),
    "silent": (signal.SIGSTOP, 2, "rank {} of 2 is lost: nothing was heard of it for 2 s"),
}


def lose(pair, case_of, how, victim):
    """A rank is lost while both compute: the other has its end and its reason in time."""
    case, folder = case_of("qwen2-4kv")
    sign, deadline, said = LOST[how]
    started(pair, **settings(folder, dist_timeout=deadline))
    pair.ask(0, "generate", prompts=[case.prompts[11]], most=4)
    if not victim:
        pair.send(1, "call", method="follow")
    pair.send(0, "generate", prompts=[case.prompts[11]], most=900)
    began = time.monotonic()
    os.kill(pair.processes[victim].pid, sign)
    well, error = pair.answer(1 - victim)
    took = time.monotonic() - began
    assert not well
    assert said.format(victim) in error
    assert took < deadline + 8  # on a loaded machine
    for refused, arguments in (("stats", {}), ("generate", {"prompts": [[1]], "most": 1})):
        pair.send(1 - victim, refused, **arguments)  # nobody who comes later waits either
        assert pair.answer(1 - victim)[0] is False


@pytest.mark.long
@pytest.mark.parametrize(("how", "victim"), [("killed", 0), ("silent", 0), ("silent", 1)])
def test_who_loses_a_rank_ends_with_an_error_in_time(doomed, case_of, how, victim):
    lose(doomed, case_of, how, victim)


def test_a_rank_that_is_killed_ends_the_other_with_an_error(pair, case_of):
    """The last of the pair."""
    lose(pair, case_of, "killed", 1)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


class Served(Server):
    """One rank of a server."""

    def __init__(self, rank, address, *words):
        super().__init__(
            "--nnodes", "2", "--tp-size", "2", "--node-rank", str(rank), "--dist-init-addr", address, *words
        )

    def _await_url(self):
        """A rank that follows says where it listens, and no more."""
        if self.words[self.words.index("--node-rank") + 1] == "0":
            return super()._await_url()
        wait_until(lambda: "follows rank 0" in self.log(), 120)
        return re.search(r"listening on (http://\S+:\d+)", self.log())[1]


@pytest.mark.long
def test_a_server_of_two_ranks_answers_503_once_one_is_killed(tmp_path):
    address = free_address()
    words = ("--max-running-requests", "2", "--chunked-prefill-size", "64")
    follower = Served(1, address, *words)
    follower.start()
    try:
        with Served(0, address, *words) as server:
            follower.url = follower._await_url()
            body = {"prompt": "What is a page?", "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] > 0
            assert httpx.get(f"{follower.url}/health", timeout=60).json() == {"status": "ok", "node_rank": 1}
            assert httpx.post(f"{follower.url}/v1/completions", json=body, timeout=60).status_code == 421
            kill = threading.Timer(0.5, follower.process.kill)
            kill.start()
            late = httpx.post(
                f"{server.url}/v1/completions", json={**body, "max_tokens": 3500, "ignore_eos": True}, timeout=60
            )
            assert late.status_code == 503
            assert "rank 1 of 2 is lost" in late.json()["error"]["message"]
            for path in ("/health", "/ready", "/v1/completions"):
                again = httpx.request("POST" if path[1] == "v" else "GET", server.url + path, json=body, timeout=60)
                assert again.status_code == 503
                assert "rank 1 of 2 is lost" in again.json()["error"]["message"]
        assert server.process.returncode == 0
    finally:
        follower.process.kill()
        follower.process.wait()
