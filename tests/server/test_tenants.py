"""Several keys: each has its own cache, names and pins, and nobody sees or ends what is another's."""

from __future__ import annotations

import contextlib
import threading

import httpx
import pytest

import rootcellar
from rootcellar.engine.identity import LONGEST_NAME
from serving import idle, on_thread, wait_until

KEYS = {"api_key": ["alice:a", "bob:b"], "admin_api_key": "root"}
IDS = list(range(5, 69))
SHORT = {"max_new_tokens": 1, "temperature": 0}


@pytest.fixture(scope="module")
def url(engine):
    with on_thread(engine, **KEYS) as url:
        yield url


@pytest.fixture
def clients(url, engine):
    """One for each key; afterwards nothing runs and nothing is pinned."""
    with contextlib.ExitStack() as stack:
        yield tuple(
            stack.enter_context(
                httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"})
            )
            for key in ("a", "b", "root")
        )  # fmt: skip
    idle(engine)


def cached(client, **where):
    found = client.post("/generate", json={"input_ids": IDS, "sampling_params": SHORT, **where})
    assert found.status_code == 200, found.text
    return found.json()["meta_info"]["cached_tokens"]


def test_each_key_has_a_cache_of_its_own(engine, clients):
    alice, bob, root = clients
    engine.flush_cache()
    assert [cached(client) for client in clients] == [0, 0, 0]
    assert min(cached(client) for client in clients) > 0
    assert cached(bob, extra_key="x", cache_salt="s") == 0
    assert cached(bob, extra_key='["s","x"]') == 0
    assert cached(alice, extra_key="x", cache_salt="s") == 0
    body = {"prompt": IDS, "max_tokens": 1}
    usage = alice.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    usage = root.post("/v1/completions", json={**body, "extra_key": "y"}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_keys_may_share_the_cache_and_nothing_else():
    with (
        rootcellar.Engine(max_total_tokens=1024, share_cache_across_keys=True) as engine,
        on_thread(engine, **KEYS) as url,
        httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer a"}) as alice,
        httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer b"}) as bob,
    ):
        assert cached(alice) == 0
        assert cached(bob) > 0
        assert alice.post("/cache/pin", json={"input_ids": IDS}).json()["pinned_tokens"] > 0
        assert bob.post("/cache/pin", json={"input_ids": IDS, "ttl": 0}).json()["unpinned"] is False
        assert alice.post("/cache/pin", json={"input_ids": IDS, "ttl": 0}).json()["unpinned"] is True


def test_an_abort_reaches_ones_own_and_counts_truly(engine, clients):
    alice, bob, root = clients
    engine.pause_generation()
    answers = {}

    def ask(name, client, rid, n=1):
        body = {"input_ids": IDS, "rid": rid, "sampling_params": {**SHORT, "n": n}}
        answers[name] = client.post("/generate", json=body).json()

    calls = [
        threading.Thread(target=ask, args=call)
        for call in (("a", alice, "user"), ("a-1", alice, "user-1"), ("b", bob, "user", 3), ("b2", bob, "other"))
    ]
    for call in calls:
        call.start()
    wait_until(lambda: engine.stats()["waiting"] == 6)

    def abort(client, rid):
        return client.post("/abort_request", json={"rid": rid}).json()["aborted"]

    assert abort(bob, "user-1-0") == abort(bob, "nobody") == 0
    assert abort(bob, "user") == 3
    assert abort(bob, "user") == 0
    assert engine.stats()["waiting"] == 3
    assert abort(alice, "other") == 0
    assert abort(alice, "user") == 1
    assert abort(root, "other") == 1  # the admin's reaches all
    engine.continue_generation()
    for call in calls:
        call.join(60)
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers["b"]] == ["abort"] * 3
    assert answers["a"]["meta_info"]["finish_reason"]["type"] == "abort"
    assert answers["a-1"]["meta_info"]["finish_reason"]["type"] == "length"


def test_explanations_and_pins_are_ones_own(engine, clients):
    alice, bob, root = clients
    engine.flush_cache()
    cached(alice)
    prompt = {"input_ids": [*IDS, 1]}

    def explain(client, **more):
        return client.post("/cache/explain", json={**prompt, **more})

    assert explain(alice).json()["cached_tokens"] > 0
    told = explain(bob)
    assert told.json()["cached_tokens"] == 0
    assert "alice" not in told.text
    assert "alice" in explain(root).json()["elsewhere"]
    assert explain(root, tenant="alice").json()["cached_tokens"] > 0
    assert explain(bob, tenant="alice").status_code == 400
    assert alice.post("/cache/pin", json=prompt).json()["pinned_tokens"] > 0
    assert bob.post("/cache/pin", json={**prompt, "ttl": 0}).json()["unpinned"] is False
    assert root.post("/cache/pin", json={**prompt, "ttl": 0, "tenant": "alice"}).json()["unpinned"] is True


def test_one_keys_pins_leave_room_for_the_others(engine, clients):
    """Pins hold at most half of the cache, and each of two keys at most half of that."""
    alice, bob, _ = clients
    engine.flush_cache()
    long = [[i, *([7] * 767)] for i in range(1, 4)]

    def pin(client, ids, ttl=60):
        return client.post("/cache/pin", json={"input_ids": ids, "ttl": ttl}).status_code

    assert engine.total_tokens == 4096
    assert pin(alice, long[0]) == 200
    assert pin(alice, long[1]) == 400
    assert pin(bob, long[2]) == 200
    assert [pin(alice, long[0], 0), pin(bob, long[2], 0)] == [200, 200]


@pytest.mark.parametrize("value", ["x" * (LONGEST_NAME + 1), "x" * 4_000_000, "a\nb"])
@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/generate", "rid", {"text": "a"}),
        ("/generate", "extra_key", {"text": "a"}),
        ("/generate", "cache_salt", {"text": "a"}),
        ("/v1/completions", "rid", {"prompt": "a"}),
        ("/v1/completions", "request_id", {"prompt": "a"}),
        ("/v1/completions", "extra_key", {"prompt": "a"}),
        ("/v1/completions", "cache_salt", {"prompt": "a"}),
        ("/v1/completions", "model", {"prompt": "a"}),
        ("/v1/chat/completions", "rid", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/chat/completions", "extra_key", {"messages": [{"role": "user", "content": "a"}]}),
        ("/cache/explain", "extra_key", {"text": "a"}),
        ("/cache/pin", "cache_salt", {"text": "a"}),
        ("/cache/pin", "tenant", {"text": "a"}),
        ("/abort_request", "rid", {}),
        ("/update_weights_from_disk", "weight_version", {"model_path": "demo"}),
    ],
)
def test_names_are_short(clients, path, field, body, value):
    """What a client names comes back in every event and wherever requests are shown."""
    refused = clients[2].post(path, json={**body, field: value})
    assert refused.status_code == (404 if field == "model" else 400)
    assert len(refused.content) < 1000
    assert field.removeprefix("request_id") in refused.text
    if field != "model" and "\n" not in value:
        assert str(LONGEST_NAME) in refused.text
