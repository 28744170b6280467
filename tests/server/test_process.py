"""A server process: its banner, many clients at once, and its end."""

import asyncio
import functools
import random
import signal
import socket
import threading
import time

import httpx
import pytest

from rootcellar import cli
from serving import Server, resident, stream, wait_until

PROMPTS = [f"Question {i}: what is a KV cache, and what is page {i} of it for?" for i in range(6)]
NORMAL = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


def body_of(i):
    """The request of client `i` and what it does: answer in full, leave midway, ask for more than fits."""
    prompt = PROMPTS[i % len(PROMPTS)]
    if i % 3 == 0:
        return {"prompt": prompt, **NORMAL, "max_tokens": 400}, "leaves"
    if i % 10 == 1:
        return {"prompt": prompt, **NORMAL, "max_tokens": 50_000}, "too much"
    if i % 10 in (2, 5):  # fits alone, but not all of these at once: some are retracted and go on later
        return {"prompt": f"{i} {prompt} " * 12, **NORMAL, "max_tokens": 500}, "large"
    return {"prompt": prompt, **NORMAL}, "normal"


async def crowd(url, clients, expected):
    """All clients at once; every one of them is judged."""
    rng = random.Random(clients)

    async def one(i):
        body, what = body_of(i)
        await asyncio.sleep(rng.random() * 0.5)
        outcome = await stream(url, body, leave_after=rng.randrange(1, 8) if what == "leaves" else None)
        if what == "too much":
            assert outcome.status == 400
            assert outcome.error["code"] == "context_length_exceeded"
        else:
            assert outcome.status == 200
            assert outcome.error is None
        if what in ("normal", "large"):
            assert outcome.done
            assert outcome.events[-1]["choices"][0]["finish_reason"] == "length"
        if what == "normal":
            assert outcome.text == expected[body["prompt"]]

    await asyncio.wait_for(asyncio.gather(*map(one, range(clients))), 240)


@pytest.mark.parametrize(
    ("clients", "rounds", "running"), [(24, 1, 8), pytest.param(200, 4, 32, marks=pytest.mark.long)]
)
def test_a_crowd_of_clients_of_which_a_third_goes_away_and_the_last_is_answered_before_the_end(
    clients, rounds, running
):
    words = ("--max-running-requests", str(running), "--chunked-prefill-size", "128")
    with Server(*words, max_total_tokens=1536) as server, server.client() as client:
        expected = {}
        for prompt in PROMPTS:
            answer = client.post("/v1/completions", json={"prompt": prompt, **NORMAL})
            expected[prompt] = answer.json()["choices"][0]["text"]
        asyncio.run(crowd(server.url, clients, expected))  # compiles, and fills what only grows once
        before = resident(server.pid)
        for _ in range(rounds):
            asyncio.run(crowd(server.url, clients, expected))
        wait_until(lambda: client.get("/v1/loads").json()["loads"][0]["num_total_reqs"] == 0)
        grown = resident(server.pid) - before
        assert client.post("/cache/check").status_code == 200
        state = client.get("/server_info").json()["internal_states"][0]
        shelf = state["cache"]["full"]["DEVICE"]
        assert shelf["free"] + shelf["cached"] == shelf["size"]
        assert shelf["pinned"] == shelf["leased"] == 0
        assert state["retractions"] > 0
        assert grown < 40e6
        assert client.get("/health").status_code == 200
        end_while_one_runs(server)


def end_while_one_runs(server):
    """A running request is finished before the end."""
    answer = []
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True}
    thread = threading.Thread(
        target=lambda: answer.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))
    )
    thread.start()
    wait_until(lambda: _active(server))
    server.stop()
    thread.join()
    assert answer[0].json()["usage"]["completion_tokens"] == 400
    assert server.process.wait(timeout=20) == 0


@pytest.mark.parametrize("clients", [60, pytest.param(200, marks=pytest.mark.long)])
def test_sigterm_under_load_leaves_nobody_without_an_answer(clients):
    drain = 2.0
    with Server("--drain-timeout", str(drain), "--max-running-requests", "8", max_total_tokens=4096) as server:
        outcomes = []

        async def load():
            # Some of them could not end before the drain does on any machine: one fills nearly all of the cache.
            sizes = [3900 if i < 16 else 16 for i in range(clients)]
            bodies = [{"prompt": PROMPTS[i % 6], "ignore_eos": True, "max_tokens": n} for i, n in enumerate(sizes)]
            httpx.post(f"{server.url}/pause_generation", json={"mode": "in_place"}, timeout=60)  # until all are there
            tasks = [asyncio.create_task(stream(server.url, body)) for body in bodies]
            await asyncio.to_thread(wait_until, lambda: _active(server) == clients, 60)
            httpx.post(f"{server.url}/continue_generation", timeout=60)
            began = time.monotonic()
            server.stop()
            await asyncio.sleep(0.3)
            late = await stream(server.url, bodies[0])  # the door still answers
            outcomes.extend(await asyncio.wait_for(asyncio.gather(*tasks), 60))
            return late, began

        late, began = asyncio.run(load())
        assert server.process.wait(timeout=30) == 0
        took = time.monotonic() - began
    assert late.status == 503
    assert late.error["code"] == "shutdown"
    assert took < drain + 8  # on a loaded machine; the drain itself and three seconds for the last words
    finished = [o for o in outcomes if o.status == 200 and o.done and o.error is None]
    ended = [o for o in outcomes if o.error is not None and o.error["code"] == "shutdown"]
    assert len(finished) + len(ended) == clients
    assert all(o.done for o in outcomes if o.status == 200)
    assert ended
    assert "no new requests" in server.log()
    assert "Traceback" not in server.log()


def _active(server, headers=None):
    (load,) = httpx.get(f"{server.url}/v1/loads", headers=headers, timeout=60).json()["loads"]
    return load["num_total_reqs"]


def test_the_banner_is_written_once_requests_are_taken_and_a_second_signal_ends_the_drain():
    with Server("--served-model-name", "cellar", "--api-key", "sesame", "--drain-timeout", "600") as server:
        assert "rootcellar serves cellar at http://127.0.0.1:" in server.log()
        assert "sesame" not in server.log()
        headers = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).json()["data"][0]["id"] == "cellar"
        assert httpx.get(f"{server.url}/v1/models", timeout=60).status_code == 401
        answer = []
        body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True}
        ask = functools.partial(httpx.post, headers=headers, timeout=60)
        thread = threading.Thread(target=lambda: answer.append(ask(f"{server.url}/v1/completions", json=body)))
        paused = ask(f"{server.url}/pause_generation", json={"mode": "in_place"})  # so that it cannot finish
        assert paused.status_code == 200
        thread.start()
        wait_until(lambda: _active(server, headers))
        server.stop(signal.SIGINT)
        wait_until(lambda: "no new requests" in server.log())
        assert httpx.get(f"{server.url}/ready", headers=headers, timeout=60).status_code == 503
        server.stop(signal.SIGINT)
        thread.join()
        assert answer[0].status_code == 503
        assert "shutting down" in answer[0].json()["error"]["message"]
        assert server.process.wait(timeout=20) == 0


def test_a_port_in_use_is_a_mistake_and_known_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == cli.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert "cannot listen" in err
    assert str(port) in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "port=70000 is not allowed"),
        (["--max-n", "0"], "max_n=0"),
        (["--model-path", "/no/such/model"], "/no/such/model"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
    ],
)
def test_wrong_settings(words, said, capsys):
    assert cli.main(["serve", "--port", "0", *words]) == cli.EXIT_MISTAKE
    assert said in capsys.readouterr().err
