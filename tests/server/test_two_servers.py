"""A decode node that has its prompts computed by a prefill node: two servers, by every route."""

import json
import signal
import socket
import threading

import httpx
import pytest

import rootcellar
from rootcellar.cli import main
from serving import Server, on_thread, wait_until

OPTIONS = {"model_path": "demo", "max_total_tokens": 1024, "max_running_requests": 4, "chunked_prefill_size": 64}
PROMPT = "A KV cache keeps what was computed of every token before, so that the next one costs less. " * 3


@pytest.fixture(scope="module")
def servers():
    """Clients of a prefill node, of a decode node that asks it, and their engines."""
    prefill = rootcellar.Engine(**OPTIONS, disaggregation_mode="prefill", disaggregation_bootstrap_port=0)
    port = prefill._parts.peers.port
    decode = rootcellar.Engine(**OPTIONS, disaggregation_mode="decode", disaggregation_bootstrap_port=port)
    with (
        prefill,
        decode,
        on_thread(prefill) as first,
        on_thread(decode, prefill_url=first) as second,
        httpx.Client(base_url=first, timeout=30) as one,
        httpx.Client(base_url=second, timeout=30) as other,
    ):
        yield one, other, prefill, decode


@pytest.fixture
def client(servers):
    """The decode node's; afterwards both nodes are at rest and whole."""
    _, client, *engines = servers
    yield client
    for engine in engines:
        wait_until(lambda engine=engine: not engine.status()["unfinished"])
        engine.check()
        stats = engine.stats()
        assert stats["running"] == stats["waiting"] == 0


def test_every_route_is_answered_with_what_the_other_node_computed(client, servers):
    *_, prefill, decode = servers
    alone = decode.generate(prompt=PROMPT, cache_salt="alone", sampling_params={"temperature": 0, "max_new_tokens": 8})
    before = decode.stats()["disaggregation"]["pages"]
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "cache_salt": "a"}
    answer = client.post("/v1/completions", json=asked).raise_for_status().json()
    assert answer["choices"][0]["text"] == alone["text"]
    pages = (len(prefill.encode(PROMPT)) - 1) // 16
    assert decode.stats()["disaggregation"]["pages"] - before == pages
    events = []
    with client.stream("POST", "/v1/completions", json={**asked, "cache_salt": "b", "stream": True}) as stream:
        events += [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    assert "".join(choice["text"] for event in events for choice in json.loads(event)["choices"]) == alone["text"]
    params = [{"temperature": 0, "max_new_tokens": 8, "n": n} for n in (2, 1)]
    body = {"text": [PROMPT, PROMPT[9:]], "sampling_params": params, "cache_salt": "c"}
    results = client.post("/generate", json=body).raise_for_status().json()
    assert [result["text"] == alone["text"] for result in results[:2]] == [True, True]
    assert len(results) == 3
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "temperature": 0}
    assert client.post("/v1/chat/completions", json=chat).raise_for_status().json()["usage"]["completion_tokens"] <= 4
    assert prefill.stats()["disaggregation"]["pages"] == decode.stats()["disaggregation"]["pages"]
    assert prefill.stats()["generated_tokens"] == 0


def test_one_timeline_shows_a_request_on_both_nodes(client, servers, capsys):
    urls = [str(each.base_url).rstrip("/") for each in servers[:2]]
    asked = {"text": PROMPT, "sampling_params": {"max_new_tokens": 2}, "cache_salt": "traced"}
    rid = client.post("/generate", json=asked).raise_for_status().json()["meta_info"]["id"]
    wait_until(lambda: not servers[2].status()["unfinished"])
    assert main(["trace", *urls]) == 0
    events = json.loads(capsys.readouterr().out)["traceEvents"]
    gave, took = sorted((e for e in events if e["name"] == rid), key=lambda each: each["pid"])
    assert gave["pid"] < 10 <= took["pid"]
    arrows = {e["ph"]: e["pid"] for e in events if e["name"] == "apart" and rid in e["id"]}
    assert sorted(arrows.values()) == [gave["pid"], took["pid"]]
    stages = {e["name"]: e for e in events if e.get("args", {}).get("rid") == rid}
    sent, came = stages["PREFILL_TRANSFER_KV_CACHE"], stages["DECODE_TRANSFERRED"]
    assert abs(sent["ts"] + sent["dur"] - came["ts"]) < 1e6, "on one clock: within a second of each other"
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert f"{urls[0]}: requests" in names
    assert main(["trace", "http://127.0.0.1:1"]) == 2


def test_what_the_prefill_node_refuses_is_said(client, servers):
    one, _, prefill, _ = servers
    prefill.pause_generation()
    prefill.release_memory_occupation("kv_cache")
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "cache_salt": "refused"})
    assert answer.status_code == 500
    assert "says 503: kv_cache released" in answer.json()["error"]["message"]
    prefill.resume_memory_occupation()
    prefill.continue_generation()
    assert one.get("/server_info").json()["disaggregation_mode"] == "prefill"


def test_a_client_that_goes_away_frees_both_nodes(client, servers):
    *_, prefill, decode = servers
    prefill.pause_generation("in_place")
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"prompt": PROMPT, "cache_salt": "gone"}, timeout=0.5)
    wait_until(lambda: not any(engine.stats()["stages"].get("DECODE_WAITING") for engine in (prefill, decode)))
    wait_until(lambda: not prefill.stats()["waiting"])
    prefill.continue_generation()


def test_routers_may_say_where_a_prompt_is_computed(client, servers):
    one, _, prefill, _ = servers
    where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": prefill._parts.peers.port, "bootstrap_room": 2**62 + 5}
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "cache_salt": "router", **where}
    given = []
    thread = threading.Thread(target=lambda: given.append(one.post("/v1/completions", json={**body, "stream": True})))
    thread.start()
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    thread.join()
    events = [line for line in given[0].iter_lines() if line.startswith("data: {")]
    assert answer["usage"]["completion_tokens"] == 8
    assert json.loads(events[-1][6:])["choices"][0]["finish_reason"] == "length"


def test_a_url_needs_a_decode_node(tiny_folder):
    with (
        rootcellar.Engine(model_path=tiny_folder, max_total_tokens=256) as engine,
        pytest.raises(rootcellar.ConfigError, match="needs disaggregation_mode"),
        on_thread(engine, prefill_url="http://127.0.0.1:1"),
    ):
        pass


def test_two_commands_are_a_system_that_outlives_either_node():
    """Whole processes: frozen, killed and started again."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    bootstrap = ["--disaggregation-bootstrap-port", str(ports[0]), "--disaggregation-heartbeat-timeout", "1"]
    giving = ["--port", str(ports[1]), "--disaggregation-mode", "prefill", *bootstrap]
    taking = ["--disaggregation-mode", "decode", "--prefill-url", f"http://127.0.0.1:{ports[1]}", *bootstrap]

    def ask(salt, **more):
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "cache_salt": salt, **more}
        return client.post("/v1/completions", json=body)

    with Server(*taking, max_total_tokens=2048) as decode, decode.client() as client:
        with Server(*giving, max_total_tokens=2048) as prefill:
            text = ask("first").raise_for_status().json()["choices"][0]["text"]
            prefill.stop(signal.SIGSTOP)
            frozen = ask("frozen")
            assert frozen.status_code == 500
            assert "timed out" in frozen.json()["error"]["message"]
            prefill.stop(signal.SIGCONT)
            assert ask("again").raise_for_status().json()["choices"][0]["text"] == text
            prefill.stop(signal.SIGKILL)
            prefill.process.wait()
            killed = ask("killed")
            assert killed.status_code == 500
            assert "prefill node at 127.0.0.1" in killed.json()["error"]["message"]
        with Server(*giving, max_total_tokens=2048) as prefill, prefill.client() as other:
            assert ask("restarted").raise_for_status().json()["choices"][0]["text"] == text
            assert client.get("/server_info").json()["internal_states"][0]["disaggregation"]["waiting"] == 0
            assert 'copied_pages_total{lane="peer-host"}' in client.get("/metrics").text
            assert 'copied_pages_total{lane="device-peer"}' in other.get("/metrics").text
            assert 'stage="PREFILL_TRANSFER_KV_CACHE"' in other.get("/metrics").text
            decode.stop(signal.SIGKILL)
            decode.process.wait()
            wait_until(
                lambda: other.get("/server_info").json()["internal_states"][0]["disaggregation"]["open_rooms"] == 0
            )
            other.get("/health").raise_for_status()
