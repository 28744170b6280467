"""A server is killed while it writes into its store, and started again on it: nothing is damaged, lost or wrong."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import itertools
import json
import random
import re
import threading

import httpx
import pytest

import rootcellar
from rootcellar import cli
from serving import Server

PAGE = 16
ASKED = 8  # tokens of an answer under load
MORE = 4  # tokens by which it is continued after the restart
CLIENTS = 4
WRITTEN = re.compile(r'rootcellar_copied_pages_total\{lane="host-storage"\} (\S+)')


@pytest.fixture(scope="module")
def bare(tiny_folder):
    """An engine without any cache."""
    with rootcellar.Engine(
        model_path=tiny_folder, skip_tokenizer_init=True, disable_radix_cache=True, max_total_tokens=1024,
        max_running_requests=4, chunked_prefill_size=64,
    ) as engine:  # fmt: skip
        yield engine


def prompt(seed, number):
    """Its first page is nobody else's."""
    rng = random.Random(seed * 1_000_000 + number)
    return [rng.randrange(500) for _ in range(rng.randint(2 * PAGE, 12 * PAGE))]


def generate(client, prompts, most):
    settings = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    answer = client.post("/generate", json={"input_ids": prompts, "sampling_params": settings})
    assert answer.status_code == 200, answer.text
    return answer.json()


def start(model, store):
    extra = {"path": str(store), "max_size": "256MiB", "min_free_space": 0, "prefetch_threshold": PAGE}
    return Server(
        "--model-path", str(model), "--skip-tokenizer-init", "--max-running-requests", str(CLIENTS),
        "--chunked-prefill-size", "64", "--enable-hierarchical-cache", "--hicache-ratio", "0.5",
        "--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config", json.dumps(extra),
        "--hicache-storage-prefetch-policy", "wait_complete", max_total_tokens=1024,
    )  # fmt: skip


def write_until_killed(server, seed, numbers, rng, least):
    """Ask for one prompt after the other, from several clients, and kill it in the midst, with ``least`` pages written.

    Returns the answers by number, None where there was none, and the pages that it had said were written.
    """
    answers: dict[int, list[int] | None] = {}
    written, enough = 0, least + rng.randint(1, 100)
    moment = rng.random() * 0.05
    print(f"kill {moment * 1000:.1f} ms after page {enough}")
    lock, over = threading.Lock(), threading.Event()

    def ask():
        with server.client() as client:
            while not over.is_set():
                with lock:
                    number = next(numbers)
                    answers[number] = None
                try:
                    answers[number] = generate(client, prompt(seed, number), ASKED)["output_ids"]
                except httpx.TransportError:
                    assert over.is_set(), server.log()

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool, server.client() as client:
        asking = [pool.submit(ask) for _ in range(CLIENTS)]
        while written < enough:
            assert not any(one.done() for one in asking), [one.exception() for one in asking if one.done()]
            written = int(float(WRITTEN.search(client.get("/metrics").text)[1]))
        # Not to wait for anything: the moment should be anywhere.
        threading.Event().wait(moment)
        over.set()
        server.process.kill()
    for one in asking:
        one.result()
    assert server.process.wait(30) == -9
    return answers, written


def check(store):
    """The pages of a store in which nothing is damaged."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = cli.main(["store", "check", str(store), "--json"])
    found = json.loads(said.getvalue())
    assert status == 0, found
    assert found["damaged"] == []
    return found["pages"]


def look(server, bare, seed, answers, written):
    """Go on with what was asked before the kill: what had been written is found, and the tokens are right.

    Returns the pages that this may write.
    """
    prompts = {number: prompt(seed, number) for number in answers}
    settings = {"temperature": 0, "max_new_tokens": ASKED + MORE, "ignore_eos": True}
    expected = bare.generate(input_ids=list(prompts.values()), sampling_params=settings)
    tokens = {number: one["output_ids"] for number, one in zip(prompts, expected, strict=True)}
    for number, answer in answers.items():
        assert answer is None or answer == tokens[number][:ASKED]
    with server.client() as client:
        found = new = 0
        for number, ids in prompts.items():  # one after the other: the host has room for what is found of one
            one = generate(client, ids + tokens[number][:ASKED], MORE)
            assert one["output_ids"] == tokens[number][ASKED:]
            cached = one["meta_info"]["cached_tokens_details"]["storage"]
            found += cached
            new += (len(ids) + ASKED + MORE - 1) // PAGE - cached // PAGE
            declined = [d for d in one["meta_info"].get("load_decisions", []) if not d["load"]]
            found += sum(decision["tokens"] for decision in declined if decision["tier"] == "storage")
        assert found >= written * PAGE
    return new


def kill_and_look(model, bare, store, kills, seed):
    rng = random.Random(seed)
    numbers = itertools.count()
    answers, own, there = {}, 0, 0
    for turn in range(kills + 1):
        with start(model, store) as server:
            others = look(server, bare, seed, answers, own) if turn else 0
            if turn == kills:
                continue
            print(f"seed {seed}, turn {turn}: ", end="")
            answers, written = write_until_killed(server, seed, numbers, rng, others)
        own, before, there = written - others, there, check(store)
        assert there >= before + written


def test_a_server_that_is_killed_while_it_writes(tiny_folder, bare, tmp_path):
    kill_and_look(tiny_folder, bare, tmp_path / "store", 2, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_server_that_is_killed_two_hundred_times(tiny_folder, bare, tmp_path, seed):
    kill_and_look(tiny_folder, bare, tmp_path / "store", 10, seed)
