"""Bodies in which one thing is huge: each is answered or refused, and a second client hardly notices."""

import random
import threading
import time

import httpx
import pytest
from test_safety import BODIES, paths_in, with_raw

from serving import Server, wait_until

# The least that is allowed whatever the machine does besides: what is refused late or computed for nothing took from
# 2 to 46 seconds of everybody's time.
SECOND = 1.5


def chain(depth):
    """A schema in which each definition needs the next."""
    links = ",".join(f'"a{i}":{{"type":"array","items":{{"$ref":"#/$defs/a{i + 1}"}}}}' for i in range(depth))
    return f'{{"$defs":{{{links},"a{depth}":{{"type":"null"}}}},"$ref":"#/$defs/a0"}}'.encode()


def huge(size):
    """JSON texts that are large each in its own way; ``size``: about how many parts they have."""
    return {
        "numbers": b"[" + b"1," * size + b"1]",
        "lists of numbers": b"[" + b"[1,2]," * size + b"[1]]",
        "texts": b"[" + b'"a b",' * size + b'"c"]',
        "one text": b'"' + b"why is it so? " * size + b'"',
        "one word": b'"' + b"x" * (10 * size) + b'"',
        "escapes": b'"' + b"\\ud83d\\ude00" * size + b'"',
        "names": b"{" + b",".join(b'"k%d":%d' % (i, i) for i in range(size)) + b"}",
        "objects": b"[" + b'{"role":"user","content":"a"},' * size + b'{"role":"user","content":"a"}]',
        "deep lists": b"[" * 900 + b"]" * 900,
        "deep objects": b'{"items":' * 400 + b"1" + b"}" * 400,
        "a number": b"1" * min(size, 4000),
        "chained references": chain(size // 10),
        "alternatives": b'{"anyOf":[' + b'{"type":"string"},' * size + b'{"type":"null"}]}',
        "a pattern": b'{"type":"string","pattern":"' + b"(a|b)*" * (size // 4) + b'"}',
        "an enumeration": b'{"enum":[' + b",".join(b'"v%d"' % i for i in range(size)) + b"]}",
    }


SCHEMA = ("response_format", "json_schema", "schema")
EXTRA = [(path, SCHEMA) for path in ("/v1/completions", "/v1/chat/completions")] + [
    ("/generate", ("sampling_params", name)) for name in ("json_schema", "regex", "ebnf", "stop", "stop_token_ids")
]


def places():
    """Every place of every body that may become huge, and the forms of an answer."""
    for path, body in BODIES.items():
        if not path.endswith(("occupation", "generation", "disk")):
            for where in paths_in(body):
                if where:
                    yield path, body, where
    for path, where in EXTRA:
        body = dict(BODIES[path], response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {}}})
        if path == "/generate":
            body = dict(BODIES[path], sampling_params={"max_new_tokens": 2, where[-1]: ""})
        yield path, body, where


class Clock:
    """A second client that asks for one token after the other, and remembers how long the longest took."""

    def __init__(self, url):
        self._client = httpx.Client(base_url=url, timeout=60)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest = 0.0
        self.asked = 0

    def ask(self):
        began = time.perf_counter()
        response = self._client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "temperature": 0})
        assert response.status_code == 200, response.text
        return time.perf_counter() - began

    def _run(self):
        while not self._ended.wait(0.01):
            took = self.ask()  # first: meanwhile `longest` may have been set back
            self.longest = max(self.longest, took)
            self.asked += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self._client.close()


@pytest.fixture(scope="module")
def server():
    with Server("--max-queued-requests", "64", max_total_tokens=2048) as server, server.client() as client:
        for path, body in BODIES.items():  # compiles what the tests need
            if not path.endswith(("occupation", "generation", "disk")):
                client.post(path, json=body)
        for length in (10, 100, 600, 1500):
            client.post("/generate", json={"input_ids": [5] * length, "sampling_params": {"max_new_tokens": 3, "n": 8}})
        yield server


@pytest.mark.parametrize(
    ("size", "most"),
    [(20_000, 80), pytest.param(20_000, None, marks=pytest.mark.long),
     pytest.param(400_000, None, marks=pytest.mark.long)],
)  # fmt: skip
def test_one_huge_thing_anywhere_in_a_body(server, size, most):
    """No 5xx, errors in their form, the process lives, and another client's one token takes no second longer."""
    values = huge(size)
    bodies = [(path, body, where, name) for path, body, where in places() for name in values]
    random.Random(size).shuffle(bodies)
    with server.client() as client, Clock(server.url) as clock:

        def longest(path, content, case):
            clock.longest, asked = 0.0, clock.asked
            response = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code < 500 or response.status_code == 503, (case, response.text[:300])
            if response.status_code >= 400:
                assert response.json()["error"].keys() == {"message", "type", "param", "code"}, case
                assert len(response.content) < 10_000, f"{case}: the error repeats what was sent"
            wait_until(lambda: clock.asked > asked, 60)  # who asked meanwhile has an answer
            return clock.longest

        for path, body, where, name in bodies[:most]:
            content, case = with_raw(body, where, values[name]), f"{name} at {path} {where}"
            # What else the machine does is no fault of the body: three times slow is slow.
            took = [longest(path, content, case)]
            while took[-1] > SECOND and len(took) < 3:
                took.append(longest(path, content, case))
            assert min(took) <= SECOND, (case, took)
    assert server.process.poll() is None, server.log()[-2000:]
