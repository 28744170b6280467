"""Several keys: each has its own cache, names and pins, and nobody sees or ends what is another's."""

from __future__ import annotations

import contextlib
import json
import threading

import httpx
import pytest
from test_access import routes_of

import rootcellar
from rootcellar.engine.identity import LONGEST_NAME
from rootcellar.server.app import create_app
from rootcellar.server.callers import Access
from rootcellar.server_config import ServerConfig
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


def test_explanations_of_requests_are_ones_own(engine, clients):
    alice, bob, root = clients
    for client, salt in ((alice, "a"), (alice, "b"), (bob, "b")):
        body = {
            "input_ids": list(range(200, 264)),
            "rid": "own",
            "cache_salt": salt,
            "explain": True,
            "sampling_params": SHORT,
        }
        told = client.post("/generate", json=body).json()["meta_info"]["explanation"]
        if client is alice and salt == "b":
            assert (told["cause"], told["detail"]) == ("other_namespace", "own had another cache_salt")
    assert (told["cause"], told["than"]) == ("first_seen", "")  # what others asked is nothing to compare with
    assert alice.get("/cache/explain/own").json()["cause"] == "other_namespace"
    assert bob.get("/cache/explain/own").json()["cause"] == "first_seen"
    assert "other_namespace" in [each["cause"] for each in alice.get("/cache/report").json()["causes"]]
    assert "other_namespace" in [each["cause"] for each in root.get("/cache/report").json()["causes"]]


def test_users_without_a_name_are_told_nothing_of_what_others_asked(engine):
    with on_thread(engine, admin_api_key="root") as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"input_ids": IDS, "sampling_params": SHORT, "explain": True}
        assert client.post("/generate", json=body).status_code == 401
        assert client.get("/cache/report").status_code == 401


@pytest.mark.parametrize("hint", [{"pin": 0}, {"demote": True}, {"pin": 60}])
def test_users_without_a_name_let_go_of_no_pin_of_the_admin(engine, hint):
    with on_thread(engine, admin_api_key="root") as url, httpx.Client(base_url=url, timeout=60) as client:
        root = {"headers": {"Authorization": "Bearer root"}}
        assert client.post("/cache/pin", json={"input_ids": IDS, "ttl": 60}, **root).json()["pinned_tokens"] > 0
        for path, body in (
            ("/generate", {"input_ids": IDS, "sampling_params": SHORT}),
            ("/v1/completions", {"prompt": IDS, "max_tokens": 1}),
        ):
            assert client.post(path, json={**body, "cache_hints": hint}).status_code == 401
        assert client.post("/cache/pin", json={"input_ids": IDS, "ttl": 0}, **root).json()["unpinned"] is True


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


def feed(client, events):
    """The first of each of these events."""
    found = {}
    with client.stream("GET", "/feed") as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.setdefault(name, json.loads(line[6:]))
            if found.keys() >= events:
                return found
    raise AssertionError("the feed ended")


def counted(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
    return float(line.split()[-1])


@pytest.mark.parametrize("share", [False, True])
def test_what_is_shown_is_ones_own(share):
    """Whatever routes a key may call, none of them tells of another's requests, neither what nor how many."""
    text = {"alice": "What is a page?", "bob": "Where do the old roots sleep in winter?"}
    with (
        rootcellar.Engine(max_total_tokens=2048, share_cache_across_keys=share) as engine,
        on_thread(engine, enable_sglang_metrics=True, **KEYS) as url,
        contextlib.ExitStack() as stack,
    ):
        alice, bob, root = (
            stack.enter_context(httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"}))
            for key in ("a", "b", "root")
        )
        for name, client, times in (("alice", alice, 1), ("bob", bob, 3)):
            for i in range(times):
                body = {"text": text[name] * 4, "rid": f"{name}s-{i}", "sampling_params": {"max_new_tokens": 8}}
                assert client.post("/generate", json=body).status_code == 200
        ids = engine.encode(text["bob"] * 4)
        paths = [
            route.path
            for route in routes_of(create_app(engine, ServerConfig()))
            if "GET" in route.methods and route.access in (Access.USER, Access.OWNER)
        ]
        assert {"/cache/tree", "/trace", "/metrics", "/server_info", "/feed"} <= set(paths)
        for path in paths:
            if path != "/feed":
                shown = alice.get(path.replace("{model:path}", "demo")).text
                assert "bob" not in shown, path
                assert "winter" not in shown, path
        live = {
            name: feed(client, {"history", "numbers", "cache"}) for name, client in (("alice", alice), ("all", root))
        }
        assert "bob" not in json.dumps(live["alice"])
        assert "winter" not in json.dumps(live["alice"])
        assert live["alice"]["cache"]["memory"] == []
        for now in live.values():
            past = now["history"][-1]
            assert past["at"] < now["numbers"]["at"]
            for name in ("input_tokens", "hit_tokens", "generated_tokens", "occupancy"):
                assert past["stats"][name] == now["numbers"]["stats"][name]
        assert live["alice"]["history"][-1]["latency"]["first_token"]["count"] == 1
        assert live["all"]["history"][-1]["latency"]["first_token"]["count"] == 4
        assert "winter" in json.dumps(live["all"])
        tree = alice.get("/cache/tree").json()
        assert {request["rid"] for request in tree["requests"]} == {"alices-0"}
        assert tree["nodes"]
        assert "What is a page?" in tree["nodes"][0]["text"]
        assert all(node["head"][:8] != ids[:8] for node in tree["nodes"])
        assert {r["rid"] for r in root.get("/cache/tree").json()["requests"]} == {
            "alices-0",
            "bobs-0",
            "bobs-1",
            "bobs-2",
        }
        spans = {event["name"] for event in alice.get("/trace").json()["traceEvents"] if event["ph"] == "X"}
        assert "alices-0" in spans
        assert not spans & {"bobs-0", "decode", "prefill"}
        assert "bobs-0" in root.get("/trace").text
        total = "rootcellar_generated_tokens_total"
        numbers = [counted(client.get("/metrics").text, total) for client in (alice, bob, root)]
        assert numbers[0] + numbers[1] == numbers[2]
        assert 0 < numbers[0] < numbers[1]
        assert "evict" not in alice.get("/metrics").text
        assert "sglang:" not in alice.get("/metrics").text
        assert "sglang:" in root.get("/metrics").text
        (state,) = alice.get("/server_info").json()["internal_states"]
        assert state["generated_tokens"] == numbers[0]
        assert sum(state["finished"].values()) == 1
        assert "cache" not in state


def test_a_key_that_all_share_is_shown_nothing_of_them(engine):
    """With an admin's key beside it; alone it is the admin's, and sees everything."""
    with on_thread(engine, api_key="u", admin_api_key="root") as url:
        for path in ("/cache/tree", "/trace", "/feed"):
            assert httpx.get(url + path, headers={"Authorization": "Bearer u"}, timeout=60).status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer u"}, timeout=60).status_code == 200


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
