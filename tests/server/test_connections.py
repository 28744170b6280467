"""What one connection may cost: how many, how long, how large a head and a body, and who gets to read the refusal."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time

import httpx
import pytest
from pydantic import BaseModel

from rootcellar.server import run
from rootcellar.server.app import create_app, routers
from rootcellar.server.connections import Connection, protocol
from rootcellar.server.parsing import Body
from rootcellar.server_config import ServerConfig
from serving import on_thread, wait_until
from slowly import slowly

ONE_TOKEN = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
JSON_TYPE = {"Content-Type": "application/json"}


def connect(url, timeout=20):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def read_all(connection):
    """What the server says until it closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


def error_of(received):
    """(status, code) of a raw answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def served(url):
    response = httpx.post(f"{url}/generate", json=ONE_TOKEN, timeout=60)
    assert response.status_code == 200, response.text


# -- how many ---------------------------------------------------------------------------------------------------------


def test_a_crowd_that_comes_while_the_loop_is_busy_waits_in_line(engine, monkeypatch):
    """Of more than the kernel lets wait it forgets some, which then try again for a minute."""
    made, busy = Connection.connection_made, threading.Event()

    def slowly(self, transport):
        if not busy.is_set():
            busy.set()
            time.sleep(1.5)
        made(self, transport)

    monkeypatch.setattr(Connection, "connection_made", slowly)
    with on_thread(engine) as url, contextlib.ExitStack() as stack:
        first = stack.enter_context(connect(url))
        assert busy.wait(10)
        crowd = [first, *(stack.enter_context(connect(url, timeout=0.9)) for _ in range(100))]
        for one in crowd:
            one.settimeout(60)
            one.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert all(read_all(one).startswith(b"HTTP/1.1 200") for one in crowd)


def test_connections_that_do_nothing_make_room_for_those_that_ask(client, engine):
    with on_thread(engine, max_connections=8) as url, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(url)) for _ in range(8)]
        idle[3].sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        for _ in range(3):
            served(url)
        assert read_all(idle[0]) == b""  # the one that waited longest was closed
        idle[7].sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_all(idle[7]).startswith(b"HTTP/1.1 200")


def test_when_every_connection_is_busy_a_new_one_is_told_so(client, engine):
    with on_thread(engine, max_connections=3) as url:
        engine.pause_generation()
        threads = [threading.Thread(target=served, args=(url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.stats()["waiting"] == 3)
        refused = httpx.get(f"{url}/health", timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert "max_connections" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        engine.continue_generation()
        for thread in threads:
            thread.join()
        served(url)


# -- how long ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty(engine):
    """A server that waits for nobody."""
    with on_thread(engine, timeout_header=0.5, timeout_body=0.5, timeout_write=1.0, max_headers=32) as url:
        yield url


HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", None),
        (b"G", (408, "too_slow")),
        (HEAD, (408, "too_slow")),
        (HEAD + b"Content-Length: 50\r\n\r\n", (408, "too_slow")),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", (408, "too_slow")),
    ],
)
def test_what_does_not_come_in_time(client, hasty, sent, answer):
    """Nothing at all, half a head, a head without its body: ended, and told why if anything came."""
    with connect(hasty) as connection:
        began = time.monotonic()
        connection.sendall(sent)
        received = read_all(connection)
        assert 0.4 < time.monotonic() - began < 15
    assert (error_of(received) if received else None) == answer


def test_a_byte_now_and_then_wins_no_time(client, hasty):
    with connect(hasty) as connection:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in HEAD * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
                if time.monotonic() - began > 10:
                    break
        assert time.monotonic() - began < 10


def test_a_kept_connection_gets_the_time_of_its_next_request_anew(client, hasty):
    connection = http.client.HTTPConnection(hasty.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.auto_open = 0
        connection.connect()
        for _ in range(4):
            connection.request("GET", "/v1/models")
            assert len(connection.getresponse().read()) > 10
            time.sleep(0.3)


def test_who_does_not_read_is_given_up(client, engine, hasty):
    """An endless answer that nobody reads ends its request, whose memory others may want."""
    body = json.dumps({"text": "Once", "stream": True, "sampling_params": {"max_new_tokens": 3900, "ignore_eos": True,
                       "temperature": 0}, "return_logprob": True, "top_logprobs_num": 8}).encode()  # fmt: skip
    with slowly(engine, 0.002), connect(hasty) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.stats()["running"], 60)
        generated = engine.stats()["generated_tokens"]
        wait_until(lambda: not engine.stats()["running"], 120)
        assert engine.stats()["generated_tokens"] - generated < 3900


def test_many_requests_at_once_on_one_connection(client, url):
    ask = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(url) as connection:
        connection.sendall(ask * 3)
        received = b""
        while received.count(b"HTTP/1.1 200") < 3:
            received += connection.recv(65536)
    with connect(url) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(ask * 5000)
        assert read_all(connection).count(b"HTTP/1.1 200") < 100
    served(url)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 10_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        + b"".join(b"x%d: " % i + b"y" * 1000 + b"\r\n" for i in range(10_000)),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 257,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX:" + b"a" * 70_000 + b"\r\n\r\n",
    ],
    ids=["target", "one field", "long fields", "many fields", "whole, and too large"],
)
def test_a_head_that_is_too_large_is_cut_off(client, url, head):
    with connect(url) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)
        assert error_of(read_all(connection)) == (431, "headers_too_large")
    served(url)


def test_a_flood_of_headers_keeps_nobody_waiting(client, url, quiet):
    """96 MB of them: refused at the limit, and what comes behind is not parsed."""
    flood = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 96 * 2**20

    def attack():
        with connect(url) as connection, contextlib.suppress(OSError):
            connection.sendall(flood)

    assert worst(url, attack) < 1.5 + 10 * quiet


def worst(url, during):
    """The longest that another client waits for one token while `during` runs on a thread."""
    thread = threading.Thread(target=during)
    longest = 0.0
    with httpx.Client(base_url=url, timeout=60) as other:
        other.post("/generate", json=ONE_TOKEN)
        thread.start()
        while True:
            running = thread.is_alive()
            began = time.monotonic()
            assert other.post("/generate", json=ONE_TOKEN).status_code == 200
            longest = max(longest, time.monotonic() - began)
            if not running:
                return longest


# -- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (b"0" * 5000, 400),
        (b"9" * 33, 400),
        (b"0000000000000002", 400),  # that is two bytes, of no JSON
        (b"99999999999999999", 413),
        (b"-5", 400),
        (b"+5", 400),
        (b"5.0", 400),
        (b"0x5", 400),
        ("²".encode("latin-1"), 400),
        (b"", 400),
        (b"5\r\nContent-Length: 6", 400),
    ],
)
def test_lengths_that_are_none(client, url, length, status):
    with connect(url) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nContent-Length: " + length + b"\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert error_of(answer)[0] == status, answer


@pytest.mark.parametrize("announced", [True, False])
def test_an_async_client_sees_that_its_body_is_too_long(client, engine, announced):
    """It reads the answer only when it has sent everything, so the server hears it out, within reason."""

    async def pieces():
        for _ in range(400):
            yield b" " * 100_000

    async def upload(url):
        content = b" " * 40_000_000 if announced else pieces()
        async with httpx.AsyncClient(timeout=60) as uploading:
            for path in ("/v1/completions", "/no/such/route"):
                response = await uploading.post(f"{url}{path}", content=content, headers=JSON_TYPE)
                yield path, response
                content = b" " * 40_000_000 if announced else pieces()

    async def run(url):
        return {path: response async for path, response in upload(url)}

    with on_thread(engine, max_body_bytes=1_000_000) as url:
        answers = asyncio.run(run(url))
    assert answers["/v1/completions"].status_code == 413
    assert answers["/v1/completions"].json()["error"]["code"] == "body_too_large"
    assert answers["/no/such/route"].status_code in (404, 413)


def test_a_key_is_missed_before_the_body_is_there_and_the_client_hears_of_it(client, engine):
    async def upload(url):
        async with httpx.AsyncClient(timeout=60) as uploading:
            return await uploading.post(f"{url}/v1/completions", content=b" " * 10_000_000, headers=JSON_TYPE)

    with on_thread(engine, api_key="sesame") as url:
        assert asyncio.run(upload(url)).status_code == 401


# -- what is wrong in a long list -------------------------------------------------------------------------------------

LONG = 200_000
WRONG = {
    "messages": ("/v1/chat/completions", {"messages": [1] * LONG}),
    "empty messages": ("/v1/chat/completions", {"messages": [{}] * LONG}),
    "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * LONG}]}),
    "good messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * LONG}),
    "tools": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [1] * LONG}),
    "stop": ("/v1/completions", {"prompt": "a", "stop": [1] * LONG}),
    "stop_token_ids": ("/v1/completions", {"prompt": "a", "stop_token_ids": ["x"] * LONG}),
    "text": ("/generate", {"text": [1] * LONG}),
    "rid": ("/generate", {"text": "a", "rid": [1] * LONG}),
    "sampling_params": ("/generate", {"text": "a", "sampling_params": [1] * LONG}),
    "tokens": ("/detokenize", {"tokens": ["a"] * LONG}),
    "token lists": ("/detokenize", {"tokens": [["a"]] * LONG}),
    "names": (
        "/v1/messages",
        {
            "model": "m",
            "max_tokens": 2,
            "messages": [{"role": "user", "content": "a"}],
            "tools": [{"name": "f", "input_schema": {f"k{i}\\": i for i in range(400_000)}}],
        },
    ),
    "brackets": ("/v1/completions", {"prompt": [[]] * 2_000_000}),
    "tags": ("/release_memory_occupation", {"tags": [1] * LONG}),
}


@pytest.fixture(scope="module")
def quiet(url):
    """What one token takes when nobody else wants anything, at worst."""
    return worst(url, lambda: time.sleep(1))


@pytest.mark.parametrize("name", WRONG)
def test_a_long_list_of_mistakes_costs_no_more_than_one(client, url, quiet, name):
    path, body = WRONG[name]
    content = json.dumps(body).encode()
    answers = []

    def attack():
        answers.append(httpx.post(f"{url}{path}", content=content, headers=JSON_TYPE, timeout=60))

    waited = worst(url, attack)
    assert answers[0].status_code == 400
    assert len(answers[0].content) < 5000
    assert waited < 1.5 + 10 * quiet  # it was 2.4 s where a quiet request takes 9 ms


def test_every_body_checks_so(engine):
    """Whatever a route takes, in every part of it: a list or a dict ends at the first item that is wrong."""
    state = create_app(engine, ServerConfig()).state.server
    bodies = {
        route.body_field.field_info.annotation
        for router in routers(state)
        for route in router.routes
        if getattr(route, "body_field", None) is not None
    }
    models = {model for body in bodies for model in models_in(body)}
    assert len(models) > 8
    assert all(issubclass(model, Body) for model in models)
    found = [part for model in models for part in items_in(model.__pydantic_core_schema__)]
    assert len(found) > 8
    assert all(part["fail_fast"] for part in found)


def models_in(annotation):
    """The models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from models_in(part)


def items_in(schema):
    """Each part of a schema that checks many items."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            yield schema
        for part in schema.values():
            yield from items_in(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            yield from items_in(part)


# -- health -----------------------------------------------------------------------------------------------------------


def test_all_who_ask_for_health_share_one_check(client, engine, url):
    """96 at once: one token or two, not 96; and another client's request is not held up by them."""
    time.sleep(1.1)  # the last answer is no longer fresh
    before = engine.stats()["generated_tokens"]

    async def ask():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=96)) as many:
            return await asyncio.gather(*(many.get(f"{url}/health") for _ in range(96)))

    began = time.monotonic()
    answers = asyncio.run(ask())
    took = time.monotonic() - began
    assert {answer.status_code for answer in answers} == {200}
    assert engine.stats()["generated_tokens"] - before <= 1 + took


def test_health_asks_a_busy_engine_for_nothing_but_a_step(client, engine, url):
    params = {"max_new_tokens": 3000, "ignore_eos": True}
    with slowly(engine):
        stream = engine.generate(prompt="Once", sampling_params=params, stream=True)
        next(stream)
        time.sleep(1.1)
        requests = engine.stats()["requests"]
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ping").json() == {"status": "ok"}
        assert engine.stats()["requests"] == requests
        stream.close()


def test_limits_belong_to_one_server():
    one, other = protocol(ServerConfig()), protocol(ServerConfig())
    assert one.keywords["held_up"] is not other.keywords["held_up"]


# -- packets ----------------------------------------------------------------------------------------------------------


def test_small_packets_are_sent_at_once():
    """Otherwise each answer on a connection that is kept open takes 40 ms longer."""

    async def accepted():
        told = asyncio.Future()
        listener = run.listen(ServerConfig(port=0))
        server = await asyncio.start_server(lambda _, writer: told.set_result(writer), sock=listener)
        _, ours = await asyncio.open_connection(*listener.getsockname())
        theirs = await told
        delay = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for writer in (ours, theirs):
            writer.close()
        server.close()
        return delay

    assert asyncio.run(accepted())
