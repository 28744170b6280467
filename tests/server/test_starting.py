"""A server that is not ready yet: it listens, refuses with the reason, and forgets what it refused."""

import contextlib
import gc
import re
import signal
import threading
import time

import httpx
import pytest
import uvicorn

import rootcellar
from rootcellar.server import loading as module
from rootcellar.server.loading import Loading
from rootcellar.server.run import Server as Uvicorn
from rootcellar.server.run import uvicorn_config
from rootcellar.server_config import ServerConfig
from serving import Server, wait_until


@contextlib.contextmanager
def served(loading, config):
    """`rootcellar serve` without its process: the server on a thread."""
    server = Uvicorn(uvicorn_config(loading, config), loading, 0)
    thread = threading.Thread(target=uvicorn.Server.run, args=(server,), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        gc.unfreeze()


@pytest.fixture
def held(engine, monkeypatch):
    """A server whose model takes until the event is set to load; the engine is that of the other tests."""
    go = threading.Event()

    def load(**_):
        assert go.wait(60)
        return engine

    monkeypatch.setattr(module, "Engine", load)
    config = ServerConfig(port=0, skip_server_warmup=True)
    with served(Loading({}, config), config) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield go, client
        go.set()


def test_until_it_is_ready_everything_is_refused_with_the_reason(held, engine):
    go, client = held
    before = engine.stats()["requests"]
    body = {"model": "demo", "prompt": "a", "max_tokens": 1}
    for response in (
        client.post("/v1/completions", json=body),
        client.post("/generate", content=b" " * 5_000_000),
        client.get("/v1/models"),
        client.get("/health"),
        client.get("/ready"),
        client.get("/ping"),
        client.get("/no/such/route"),
    ):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("loading", "service_unavailable")
        assert "loading the model" in error["message"]
    assert client.get("/version").json() == {"version": rootcellar.__version__}
    page = client.get("/")
    assert page.status_code == 503
    assert "loading the model" in page.text
    assert "refresh" in page.text  # it looks again by itself
    go.set()
    wait_until(lambda: client.get("/ready").status_code == 200, 60)
    assert engine.stats()["requests"] == before  # what was refused is not processed later
    assert client.post("/v1/completions", json=body).status_code == 200
    assert client.get("/version").json() == {"version": rootcellar.__version__}
    assert client.get("/").status_code == 200


def test_the_body_limits_hold_from_the_first_moment(held):
    _, client = held
    response = client.get("/health", headers={"X": "a" * 100_000})
    assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")
    response = client.post("/generate", content=b" " * 20_000_000)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_failure_to_load_ends_the_server(monkeypatch):
    def load(**_):
        raise rootcellar.errors.ModelError("there is no such model")

    monkeypatch.setattr(module, "Engine", load)
    config = ServerConfig(port=0)
    loading = Loading({}, config)
    server = Uvicorn(uvicorn_config(loading, config), loading, 0)
    thread = threading.Thread(target=uvicorn.Server.run, args=(server,), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "no such model" in str(loading.error)


def test_a_signal_while_loading_is_obeyed_at_once():
    server = Server(warm=True)
    server.start()
    try:
        wait_until(lambda: "listening on http://127.0.0.1:" in server.log(), 120)
        began = time.monotonic()
        server.stop()
        assert server.process.wait(timeout=60) == -signal.SIGTERM
        assert time.monotonic() - began < 30
    finally:
        server.process.kill()
    assert "Traceback" not in server.log()
    assert "rootcellar serves" not in server.log()


def test_progress_is_told_and_first_requests_are_taken_before_all_is_compiled(tiny_folder):
    """The log names what is compiled; the banner comes when a request can be answered, the rest is compiled behind.

    Idle then, the server stops at once and cleanly.
    """
    words = ("--model-path", str(tiny_folder), "--max-running-requests", "2", "--chunked-prefill-size", "64")
    with Server(*words, warm=True, max_total_tokens=256) as server, server.client() as client:
        ready_at = server.log()
        answer = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 2})
        assert answer.status_code == 200
        first = int(re.search(r"compiling 1 of (\d+): decoding for 1", ready_at)[1])
        assert f"compiling {first} of {first}: sampling for 4, drawn" in ready_at
        assert f"page     {server.url}/" in ready_at
        wait_until(lambda: "more programs" in server.log())
        rest = int(re.search(r"ready; (\d+) more programs", server.log())[1])
        assert rest > 5
        wait_until(lambda: f"compiled: all {rest} programs" in server.log(), 240)
        before = client.get("/server_info").json()["internal_states"][0]["compilations"]
        for prompt, n in (("a " * 60, 1), ("b " * 20, 2)):
            body = {"prompt": prompt, "max_tokens": 4, "n": n, "temperature": 0.7, "presence_penalty": 0.5}
            assert client.post("/v1/completions", json=body).status_code == 200
        assert client.get("/server_info").json()["internal_states"][0]["compilations"] == before
        began = time.monotonic()
        server.stop()
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - began < 8
        assert "Traceback" not in server.log()
