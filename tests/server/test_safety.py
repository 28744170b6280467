"""Keys, limits, clients that go away, and bodies that nobody should send."""

import asyncio
import contextlib
import gzip
import json
import socket
import time
from collections import Counter

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

import rootcellar
from rootcellar.server import run
from rootcellar.server.app import create_app
from rootcellar.server_config import ServerConfig
from serving import idle, on_thread, wait_until

# -- limits -----------------------------------------------------------------------------------------------------------


def test_long_bodies_are_refused_whether_announced_or_not(engine):
    body = json.dumps({"prompt": "x" * 5000}).encode()
    with on_thread(engine, max_body_bytes=4096) as url:
        for content in (body, iter([body[:3000], body[3000:]])):
            response = httpx.post(
                f"{url}/v1/completions", content=content, headers={"Content-Type": "application/json"}, timeout=60
            )
            assert response.status_code == 413
            assert "max_body_bytes" in response.json()["error"]["message"]
        ok = httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 50, "max_tokens": 1}, timeout=60)
        assert ok.status_code == 200


def test_the_limit_on_prompts(engine):
    with on_thread(engine, max_prompt_length=20) as url:
        for prompt in ("a b c d e f g h i j k l m n o p", [1] * 20):
            assert (
                httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 1}, timeout=60).status_code
                == 200
            )
        for prompt in ("1 2 3 4 5 6 7 8 9 " * 10, [1] * 21):
            response = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 1}, timeout=60)
            assert response.status_code == 400
            assert "20" in response.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_back():
    with (
        rootcellar.Engine(max_total_tokens=512, max_running_requests=1, max_queued_requests=2) as engine,
        on_thread(engine) as url,
    ):
        engine.pause_generation()
        waiting = engine.generate(prompt=["a"] * 3, sampling_params={"max_new_tokens": 2}, stream=True)
        refused = httpx.post(f"{url}/generate", json={"text": "a"}, timeout=60)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        too_many = httpx.post(f"{url}/generate", json={"text": ["a"] * 4}, timeout=60)
        assert too_many.status_code == 400  # trying again would not help
        engine.continue_generation()
        assert len([r for r in waiting if r["meta_info"]["finish_reason"]]) == 3
        assert httpx.post(f"{url}/generate", json={"text": "a"}, timeout=60).status_code == 200
        idle(engine)


def test_requests_that_take_too_long_end_with_an_error():
    with (
        rootcellar.Engine(model_path="demo", max_total_tokens=2048, request_timeout=0.3) as engine,
        on_thread(engine) as url,
    ):
        engine.pause_generation()  # so that nothing can finish in time
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60)
        assert response.status_code == 504
        assert "request_timeout" in response.json()["error"]["message"]
        engine.continue_generation()
        slow = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        for _ in range(20):  # the first may end while it still compiles, before its stream begins
            response = httpx.post(f"{url}/v1/completions", json=slow, timeout=60)
            if response.status_code == 200:
                break
        *_, last, done, _ = response.text.split("\n\n")
        assert json.loads(last[6:])["error"]["type"] == "timeout_error"
        assert done == "data: [DONE]"
        idle(engine)


# -- clients that go away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_client_that_goes_away_frees_its_pages(client, engine, url, path, stream):
    body = {
        "/generate": {"text": "Once", "sampling_params": {"max_new_tokens": 3900, "ignore_eos": True}},
        "/v1/completions": {"prompt": ["Once", "Twice"], "max_tokens": 3900, "ignore_eos": True},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "n": 2},
    }[path]
    before = engine.stats()["generated_tokens"]
    with contextlib.suppress(httpx.ReadTimeout), httpx.Client(base_url=url, timeout=0.1) as leaving:
        if stream:
            with leaving.stream("POST", path, json={**body, "stream": True}) as response:
                next(response.iter_lines())
        else:
            leaving.post(path, json=body)
    wait_until(lambda: not engine.stats()["running"], 3)
    assert engine.stats()["generated_tokens"] - before < 3900
    idle(engine)


def test_going_away_while_waiting_in_line(client, engine, url):
    engine.pause_generation()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/generate", json={"text": "a"}, timeout=0.1)
    wait_until(lambda: not engine.stats()["waiting"], 3)
    engine.continue_generation()


def test_a_slow_reader_holds_up_nobody_and_misses_nothing(client, engine, url):
    """One client does not read while the answer is made; another is served at once, and the first gets all of it."""
    params = {"temperature": 0, "max_new_tokens": 600, "ignore_eos": True}
    expected = engine.generate(prompt="Once", sampling_params=params)["text"]
    body = json.dumps({"text": "Once", "sampling_params": params, "stream": True}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.stats()["running"])
        began = time.monotonic()
        assert client.post("/generate", json={"text": "b", "sampling_params": {"max_new_tokens": 4}}).status_code == 200
        assert time.monotonic() - began < 5
        wait_until(lambda: not engine.stats()["running"], 30)  # the engine has finished, and waited for no reader
        received = b""
        while part := slow.recv(65536):
            received += part
    events = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert json.loads(events[-1])["text"] == expected
    assert len(events) < 1000  # what nobody read in time was left out


# -- the banner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("::1", None, False),
     ("localhost", None, False), ("example.org", None, True)],
)  # fmt: skip
def test_the_banner_warns_of_an_open_door(engine, host, key, warned):
    state = create_app(engine, ServerConfig(host=host, api_key=key)).state.server
    text = run.banner(state, 1234)
    assert ("WARNING" in text) is warned
    assert "demo" in text
    assert "4,096 tokens" in text
    assert "/v1/chat/completions" in text
    assert "k'" not in text


# -- bodies -----------------------------------------------------------------------------------------------------------

BODIES = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "stop": ["x"], "logprobs": 1, "n": 1, "seed": 1,
                        "stream_options": {"include_usage": True}, "response_format": {"type": "text"}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2,
                             "chat_template_kwargs": {}, "tool_choice": "auto",
                             "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}],
                             "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
    "/v1/messages": {"messages": [{"role": "user", "content": [
                         {"type": "tool_use", "id": "a", "name": "f", "input": {}},
                         {"type": "tool_result", "tool_use_id": "a", "content": "b"}]}],
                     "max_tokens": 2, "system": [{"type": "text", "text": "a"}], "tool_choice": {"type": "auto"},
                     "tools": [{"name": "f", "input_schema": {}}], "thinking": {"type": "enabled"}, "top_k": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                                {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                                {"type": "function_call_output", "call_id": "a", "output": "b"}],
                      "max_output_tokens": 2, "tools": [{"type": "function", "name": "f", "parameters": {}}],
                      "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "store": False},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2, "stop": ["x"], "temperature": 1, "n": 1},
                  "rid": "r", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1, 2]},
    "/abort_request": {"rid": "a"},
    "/cache/explain": {"input_ids": [1, 2], "extra_key": "a"},
    "/cache/pin": {"text": "a", "ttl": 0},
    "/update_weights_from_disk": {"model_path": "/nowhere", "weight_version": "1"},
    "/update_weights_from_tensor": {"serialized_named_tensors": ["AAAA"], "load_format": "safetensors"},
    "/update_weights_from_distributed": {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "number": 1},
    "/init_weights_update_group": {"master_address": "127.0.0.1", "master_port": 1, "backend": "jax"},
    "/destroy_weights_update_group": {"group_name": "a"},
    "/release_memory_occupation": {"tags": []},
    "/resume_memory_occupation": {"tags": []},
    "/pause_generation": {"mode": "gently"},
}  # fmt: skip
JSON_TYPE = {"Content-Type": "application/json"}
DEEP = b"[" * 900 + b"]" * 900
NASTY = [
    b"null", b"true", b"-1", b"0", b"1e400", b"-1e400", b"1" + b"0" * 400, b"1.5", b"2147483648", b"9" * 20, b"NaN",
    b"Infinity", b'""', b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b"[]",
    b"{}", b"[null]", b"[[]]", b'[""]', b'["a", 1]', b"[1, [2]]", b'{"a": {"b": []}}', DEEP,
    b'{"a":' * 300 + b"1" + b"}" * 300, b'"' + b"x" * 3000 + b'"',
    b'"\\u0000\\ud83d\\ude00"', b"[1, 2", b'"', b"{,}", b"'a'",
]  # fmt: skip


def paths_in(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_in(child, (*path, key))


def with_raw(value, path, raw):
    """The JSON text of `value` with the bytes `raw` in one place."""
    if not path:
        return raw
    if isinstance(value, dict):
        parts = [
            json.dumps(k).encode() + b":" + (with_raw(v, path[1:], raw) if k == path[0] else json.dumps(v).encode())
            for k, v in value.items()
        ]
        return b"{" + b",".join(parts) + b"}"
    parts = [with_raw(v, path[1:], raw) if i == path[0] else json.dumps(v).encode() for i, v in enumerate(value)]
    return b"[" + b",".join(parts) + b"]"


@pytest.fixture(scope="module")
def small():
    """An engine whose requests are short whatever they ask for, and the URL of a server over it."""
    with (
        rootcellar.Engine(model_path="demo", max_total_tokens=512, context_length=64, max_queued_requests=32) as engine,
        on_thread(engine, max_n=4, max_batch_size=4, response_pin=0) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield engine, client
        answers(client)
        idle(engine)


def answers(client):
    response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert response.status_code == 200, response.text


def sound(response):
    """No 5xx; an error has the form that clients expect."""
    assert response.status_code < 500, (response.request.url, response.request.content[:300], response.text)
    if response.status_code >= 400:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", BODIES)
def test_one_wrong_thing_anywhere_in_a_body(small, path):
    """Every place of a valid body, each of a list of nasty values in it."""
    engine, client = small
    for where in paths_in(BODIES[path]):
        for raw in NASTY:
            body = with_raw(BODIES[path], where, raw)
            sound(client.post(path, content=body, headers={"Content-Type": "application/json"}))
    client.post("/resume_memory_occupation")
    client.post("/continue_generation")
    answers(client)
    idle(engine)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def changed(data, path):
    """A body of ``path`` with something that Hypothesis invents in one place, and perhaps broken bytes in another."""
    where = data.draw(st.sampled_from(list(paths_in(BODIES[path]))))
    body = with_raw(BODIES[path], where, json.dumps(data.draw(JSON)).encode())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(body)))
        body = body[:at] + data.draw(st.binary(max_size=3)) + body[at + data.draw(st.integers(0, 2)) :]
    return body


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_changes_of_bodies(small, data):
    """As above with values that Hypothesis invents, lone surrogates and NaN among them; broken bytes too."""
    _, client = small
    path = data.draw(st.sampled_from([p for p in BODIES if not p.endswith(("occupation", "generation"))]))
    sound(client.post(path, content=changed(data, path), headers=JSON_TYPE))


@pytest.fixture(scope="module")
def roomy():
    """An engine that has room for tools, and the URL of a server over it that keeps conversations."""
    limits = {"max_total_tokens": 8192, "max_queued_requests": 32, "request_timeout": 20}
    with (
        rootcellar.Engine(model_path="demo", **limits) as engine,
        on_thread(engine, max_n=4, max_batch_size=4) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield engine, client


@pytest.mark.long
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"])
def test_changes_of_bodies_where_they_are_answered(roomy, path):
    """Both of the above where a body's tools do not make it too long: many are answered, and none with a 5xx."""
    engine, client = roomy
    statuses = Counter()

    def send(body):
        sound(response := client.post(path, content=body, headers=JSON_TYPE))
        statuses[response.status_code] += 1

    send(json.dumps(BODIES[path]).encode())
    assert statuses[200]
    for where in paths_in(BODIES[path]):
        for raw in NASTY:
            send(with_raw(BODIES[path], where, raw))

    @settings(max_examples=1500, database=None, deadline=None)
    @given(data=st.data())
    def run(data):
        send(changed(data, path))

    run()
    print(path, dict(statuses))
    assert statuses[200] > sum(statuses.values()) / 200
    answers(client)
    engine.flush_cache()
    idle(engine)


@pytest.mark.parametrize(
    ("headers", "content", "statuses"),
    [
        ({"Content-Type": "text/plain"}, b'{"prompt": "a"}', {415}),
        ({}, b'{"prompt": "a"}', {415}),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"prompt=a", {415}),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x--", {415}),
        ({"Content-Type": "application/json; charset=utf-16"}, '{"prompt": "a"}'.encode("utf-16"), {400}),
        (
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            gzip.compress(b'{"prompt": "a"}', mtime=0),
            {400},
        ),
        ({"Content-Type": "application/json"}, b"", {400}),
        ({"Content-Type": "\xff/\xfe".encode("latin-1")}, b"{}", {400, 415}),
        ({"Content-Type": "application/json"}, b"\0" * 100, {400}),
    ],
)
def test_bodies_that_are_no_json(small, headers, content, statuses):
    _, client = small
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code in statuses, response.text
    sound(response)


def test_a_prompt_of_ten_megabytes(small):
    engine, client = small
    for prompt in ("a" * 10_000_000, "word " * 2_000_000, "\0" * 1_000_000, "🙂" * 2_000_000, ["ab"] * 2_000_000):
        began = time.monotonic()
        sound(refused := client.post("/v1/completions", json={"prompt": prompt}))
        assert refused.status_code in (400, 413)
        assert len(refused.content) < 5000
        assert time.monotonic() - began < 20
    ids = client.post("/generate", content=b'{"input_ids": [' + b"1," * 4_000_000 + b"1]}", headers=JSON_TYPE)
    sound(ids)
    assert ids.status_code == 400
    idle(engine)


def test_broken_http(small):
    """What is no HTTP closes its own connection and nothing else."""
    engine, client = small
    host, port = client.base_url.host, client.base_url.port
    for raw in (
        b"\0\0\0\0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                answer = connection.recv(65536)
                assert not answer.startswith(b"HTTP/1.1 5")
    answers(client)
    idle(engine)


# -- the schema -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("examples", [3, pytest.param(400, marks=pytest.mark.long)])
def test_what_the_schema_allows_and_what_it_does_not(small, mode, examples):
    """Every operation of the OpenAPI schema, with data that fits it and with data that does not (schemathesis)."""
    import schemathesis  # seconds, which no other test should wait for

    _, client = small
    mode = schemathesis.GenerationMode(mode)
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    assert sum(_try(client, operation, mode, examples) for operation in operations) > 12


def _try(client, operation, mode, examples):
    """Call one operation again and again; whether there was anything to try."""

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        response = case.call(base_url=str(client.base_url))
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        if operation.path.startswith(("/release", "/sleep", "/pause")):  # what was wanted must not fail the next
            client.post("/resume_memory_occupation")
            client.post("/continue_generation")

    try:
        run()
    except Unsatisfiable:  # nothing can be wrong with what an operation takes that takes nothing
        return False
    return True


# -- many at once -----------------------------------------------------------------------------------------------------


def test_two_event_loops_may_share_an_engine(engine):
    async def one():
        result = await engine.async_generate(prompt="a", sampling_params={"temperature": 0, "max_new_tokens": 3})
        return result["output_ids"]

    assert asyncio.run(one()) == asyncio.run(one())
