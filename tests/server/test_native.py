"""SGLang's routes, vLLM's names, and our own."""

import contextlib
import itertools
import json
import re
import threading
import time

import httpx
import pytest
from test_openai import events

import rootcellar
from rootcellar import demo
from rootcellar.errors import CacheBroken
from serving import on_thread, wait_until
from slowly import slowly

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
META = {
    "id", "prompt_tokens", "completion_tokens", "cached_tokens", "cached_tokens_details", "finish_reason",
    "e2e_latency", "queue_time", "first_token_latency", "weight_version",
}  # fmt: skip


def post(client, path, status=200, **body):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def generate(client, status=200, **body):
    return post(client, "/generate", status, **{"sampling_params": GREEDY, **body})


# -- /generate --------------------------------------------------------------------------------------------------------


def test_generate_is_what_the_engine_says(client, engine):
    expected = engine.generate(prompt="What is a", sampling_params=GREEDY)
    for body in ({"text": "What is a"}, {"input_ids": engine.encode("What is a")}):
        answer = generate(client, **body, rid="mine")
        assert answer["text"] == expected["text"]
        assert answer["output_ids"] == expected["output_ids"]
        assert answer["meta_info"].keys() >= META
        assert answer["meta_info"]["id"] == "mine"
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 12}


def test_lists_and_n(client):
    answers = generate(client, text=["What is a", "The"], rid=["a", "b"])
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b"]
    assert len(generate(client, text=["What is a"])) == 1
    assert len(generate(client, text="What", sampling_params={"n": 3, "max_new_tokens": 2})) == 3
    each = generate(client, text=["What", "The"], sampling_params=[{"max_new_tokens": 2}, {"max_new_tokens": 3}])
    assert [answer["meta_info"]["completion_tokens"] for answer in each] == [2, 3]


def test_streams_are_cumulative(client):
    whole = generate(client, text=["What is a", "The"])
    parts = events(
        client.post("/generate", json={"text": ["What is a", "The"], "sampling_params": GREEDY, "stream": True})
    )
    for i in (0, 1):
        mine = [part for part in parts if part["index"] == i]
        assert all(b["text"].startswith(a["text"]) for a, b in itertools.pairwise(mine))
        assert mine[-1]["text"] == whole[i]["text"]
        assert mine[-1]["output_ids"] == whole[i]["output_ids"]
        assert [part["meta_info"]["finish_reason"] is None for part in mine] == [True] * (len(mine) - 1) + [False]


def test_logprobs(client):
    answer = generate(client, text="What is a", return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    meta = answer["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]
    assert meta["input_token_logprobs"][0][0] is None
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert all(len(row) == 2 for row in meta["output_top_logprobs"])
    assert all(text is None for _, _, text in meta["output_token_logprobs"])
    told = generate(client, text="What is a", return_logprob=[True], return_text_in_logprobs=True)
    assert "".join(text for _, _, text in told["meta_info"]["output_token_logprobs"]) == answer["text"]


def test_what_asks_for_nothing_is_accepted(client):
    neutral = {"stop": None, "stop_regex": None, "logit_bias": None, "spaces_between_special_tokens": True}
    plain = generate(client, text="What", lora_path=None, image_data=None, session_params=None)
    assert generate(client, text="What", sampling_params={**GREEDY, **neutral})["text"] == plain["text"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "either a text or token ids"),
        ({"text": "a", "input_ids": [1]}, "not both"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"text": "a", "sampling_params": {"n": 100}}, "max_n"),
        ({"text": "a", "sampling_params": {"n": "2"}}, "n='2'"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params must be"),
        ({"text": "a", "sampling_params": {"logit_bias": {"1": 200}}}, "logit_bias"),
        ({"text": "a", "sampling_params": {"regex": "("}}, "regex is not understood"),
        ({"text": "a", "lora_path": "x"}, "lora_path is not supported"),
        ({"text": "a", "logprob_start_len": 100, "return_logprob": True}, "beyond the prompt"),
        ({"text": ["a", "b"], "top_logprobs_num": [1, 2]}, "the same for all prompts"),
        ({"text": "a", "rid": "x" * 3, "priority": 2**40}, "priority"),
    ],
)
def test_what_is_wrong_is_said(client, body, said):
    assert said in generate(client, 400, **body)["error"]["message"]


@contextlib.contextmanager
def streaming(client, **body):
    """A stream of which the first line has come; leaving goes away from it."""
    params = {"max_new_tokens": 3000, "ignore_eos": True}
    body = {"text": "a", "stream": True, "sampling_params": params, **body}
    with client.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def test_a_name_in_use_is_refused_and_the_first_request_goes_on(client, engine):
    with slowly(engine), streaming(client, rid="one"):
        assert "in use" in generate(client, 400, text="b", rid="one")["error"]["message"]
        assert engine.stats()["running"] == 1


def test_tokenize_and_back(client, engine):
    text = "What is a KV cache? äöü 你好 🙂"
    tokens = post(client, "/tokenize", prompt=text)["tokens"]
    assert tokens == engine.encode(text)
    assert post(client, "/detokenize", tokens=tokens)["text"] == text
    two = post(client, "/tokenize", prompt=["a", "b c"])
    assert two["count"] == [len(ids) for ids in two["tokens"]]
    assert post(client, "/detokenize", tokens=two["tokens"])["text"] == ["a", "b c"]
    assert post(client, "/detokenize", tokens=[])["text"] == ""
    for wrong in ([-1], [1024], [2**70], ["a"], [[1], 2], [1.5]):
        assert "tokens" in post(client, "/detokenize", 400, tokens=wrong)["error"]["message"]


# -- health and information -------------------------------------------------------------------------------------------


def test_health_generates(client, engine):
    time.sleep(1.1)  # an older answer is no longer fresh
    before = engine.stats()["generated_tokens"]
    assert client.get("/health").json() == {"status": "ok"}
    assert engine.stats()["generated_tokens"] == before + 1
    assert client.get("/ready").json() == {"status": "ready"}


def test_a_step_that_fails_is_unhealthy(client, engine, monkeypatch):
    def broken(*_):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(engine._parts.runner, "step", broken)
    time.sleep(1.1)
    response = client.get("/health")
    assert response.status_code == 500
    assert "on fire" in response.json()["error"]["message"]
    monkeypatch.undo()
    assert client.get("/health").status_code == 200


def test_a_busy_server_is_healthy():
    """With no room in the line, that the engine advances is enough; a paused one is alive, but not ready."""
    with (
        rootcellar.Engine(model_path="demo", max_total_tokens=2048, max_running_requests=1, max_queued_requests=1) as e,
        on_thread(e) as url,
        slowly(e),
    ):
        stream = e.generate(
            prompt=["a", "b"], sampling_params={"max_new_tokens": 1900, "ignore_eos": True}, stream=True
        )
        next(stream)
        assert httpx.post(f"{url}/generate", json={"text": "a"}, timeout=60).status_code == 429
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
        stream.close()


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(client, path):
    info = client.get(path).json()
    assert info.items() >= {"model_path": "demo", "is_generation": True, "weight_version": "0"}.items()


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_tells_settings_and_no_key(engine, path):
    with on_thread(engine, api_key="sesame") as url:
        info = httpx.get(url + path, headers={"Authorization": "Bearer sesame"}, timeout=60)
    assert info.json().items() >= {"page_size": 16, "max_total_num_tokens": 4096, "max_body_bytes": 2**24}.items()
    assert "sesame" not in info.text


def test_loads(client, engine):
    """What is only cached is not used: a server with much to hit is no busier for it."""
    engine.generate(input_ids=[[7] * 1500, [8] * 1500], sampling_params={"max_new_tokens": 1})
    assert engine.stats()["occupancy"]["DEVICE"]["used"] > 0.7
    for path in ("/v1/loads", "/loads"):
        answer = client.get(path).json()
        (load,) = answer["loads"]
        assert (load["token_usage"], load["num_used_tokens"], load["num_total_reqs"]) == (0, 0, 0)
        assert load["max_total_num_tokens"] == 4096
        assert answer["aggregate"]["total_reqs"] == 0
        assert answer["aggregate"]["avg_token_usage"] == 0
        assert answer["timestamp"]
    assert client.get("/get_load").json() == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
    with streaming(client):
        (load,) = client.get("/v1/loads").json()["loads"]
        (older,) = client.get("/get_load").json()
    assert load["num_running_reqs"] == older["num_reqs"] == 1
    assert 0 < load["token_usage"] < 0.7
    assert load["num_used_tokens"] > 0 < older["num_tokens"]


def test_a_path_that_is_none_is_told_the_nearest(client):
    error = client.post("/v1/chat/completion", json={}).json()["error"]
    assert error["message"] == "there is no route /v1/chat/completion: did you mean /v1/chat/completions?"
    assert error["code"] == "no_such_route"
    response = client.get("/" + "x" * 5000)
    assert response.status_code == 404
    assert "/docs" in response.json()["error"]["message"]
    assert len(response.content) < 400
    wrong = client.get("/generate")
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (405, "this route does not take GET: use POST")


@pytest.mark.parametrize("model", [None, "", "default", "unknown", "demo"])
def test_routers_that_name_no_model_mean_the_one_that_is_served(client, model):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "model": model}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert client.post("/v1/chat/completions", json={**body, "model": "gpt"}).status_code == 404


def test_the_page_of_the_api_asks_no_other_host(client):
    page = client.get("/docs")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    found = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert "/page/docs.js" in found
    for target in found:
        assert target.startswith("/"), target
        assert client.get(target).status_code == 200, target
    assert "http" not in re.sub(r"http-equiv", "", page.text)


# -- control ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own():
    """A client of a server with an engine of its own, for what would disturb others."""
    with (
        rootcellar.Engine(model_path="demo", max_total_tokens=2048, max_running_requests=4) as engine,
        on_thread(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        client.engine = engine
        yield client


def long(client, **body):
    """A request that runs until somebody ends it, on a thread; its answer is `[response]`."""
    answer, before = [], client.engine.stats()["generated_tokens"]
    params = {"temperature": 0, "max_new_tokens": 1900, "ignore_eos": True}
    body = {"text": "Once", "sampling_params": params, **body}

    def call():
        with slowly(client.engine):
            answer.append(httpx.post(f"{client.base_url}/generate", json=body, timeout=60))

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: client.engine.stats()["generated_tokens"] > before, 60)
    return thread, answer


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache(own, method):
    prompt = "This is long enough for more than one page of the cache. " * 3
    generate(own, text=prompt)
    assert generate(own, text=prompt)["meta_info"]["cached_tokens"] > 0
    assert own.request(method, "/flush_cache").status_code == 200
    assert generate(own, text=prompt)["meta_info"]["cached_tokens"] == 0


def test_flush_is_refused_while_requests_run_and_can_wait(own):
    thread, answer = long(own, rid="long")
    refused = own.post("/flush_cache")
    assert refused.status_code == 400
    assert "1 requests run" in refused.json()["error"]["message"]
    assert own.get("/flush_cache", params={"timeout": 0.05}).status_code == 400
    timer = threading.Timer(0.2, lambda: post(own, "/abort_request", rid="long"))
    timer.start()
    assert own.get("/flush_cache", params={"timeout": 20}).status_code == 200
    thread.join()
    timer.join()
    assert answer[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert own.post("/flush_cache", params={"timeout": "x"}).status_code == 400


def test_abort_gives_what_there_is(own):
    thread, answer = long(own, rid="long")
    assert post(own, "/abort_request", rid="long")["aborted"] == 1
    thread.join()
    assert answer[0].status_code == 200
    meta = answer[0].json()["meta_info"]
    assert meta["finish_reason"].items() >= {"type": "abort", "cause": "asked"}.items()
    assert meta["completion_tokens"] > 0
    assert post(own, "/abort_request", rid="long")["aborted"] == 0
    assert "rid" in post(own, "/abort_request", 400)["error"]["message"]


def test_abort_ends_every_answer_of_a_request_and_abort_all_everything(own):
    thread, answer = long(own, rid="many", sampling_params={"n": 3, "max_new_tokens": 500, "ignore_eos": True})
    post(own, "/abort_request", rid="many")
    thread.join()
    assert [each["meta_info"]["finish_reason"]["type"] for each in answer[0].json()] == ["abort"] * 3
    thread, answer = long(own)
    assert post(own, "/abort_request", abort_all=True)["aborted"] == 1
    thread.join()


def test_sleep_and_wake_up(own):
    expected = generate(own, text="What is a")["text"]
    for release, resume, body in (
        ("/release_memory_occupation", "/resume_memory_occupation", {"tags": ["kv_cache", "weights"]}),
        ("/sleep?level=1", "/wake_up", {}),
    ):
        freed = post(own, release, **body)
        assert freed["buffers"] > 4
        assert freed["bytes"] > 2_000_000
        assert own.get("/is_sleeping").json() == {"is_sleeping": True}
        refused = generate(own, 503, text="What is a")
        assert "resume_memory_occupation" in refused["error"]["message"]
        assert own.get("/ready").status_code == 503
        assert own.get("/health").json()["status"] == "asleep"
        assert post(own, resume)["bytes"] == freed["bytes"]
        assert own.get("/is_sleeping").json() == {"is_sleeping": False}
        assert generate(own, text="What is a")["text"] == expected
    assert "unknown tag" in post(own, "/release_memory_occupation", 400, tags=["shoes"])["error"]["message"]


def test_pause_and_continue(own):
    post(own, "/pause_generation", mode="in_place")
    assert own.get("/ready").status_code == 503
    answer = []
    thread = threading.Thread(target=lambda: answer.append(generate(own, text="What is a")))
    thread.start()
    wait_until(lambda: own.engine.stats()["waiting"])
    time.sleep(0.05)
    assert not answer
    post(own, "/continue_generation")
    thread.join()
    assert answer[0]["meta_info"]["completion_tokens"] == 12
    assert "mode" in post(own, "/pause_generation", 400, mode="gently")["error"]["message"]


def test_new_weights(own):
    prompt = "This is long enough for more than one page of the cache. " * 3
    before = generate(own, text=prompt)
    updated = post(own, "/update_weights_from_disk", model_path=str(demo.path()), weight_version="two")
    assert updated["weight_version"] == "two"
    after = generate(own, text=prompt)
    assert after["meta_info"]["cached_tokens"] > 0  # the same files by another version: their KV is what it was
    assert after["meta_info"]["weight_version"] == "two"
    assert after["text"] == before["text"]
    assert own.get("/model_info").json()["weight_version"] == "two"


@pytest.mark.parametrize("path", ["/no/such/folder", "\0", "x" * 5000, "/etc/passwd", "/proc/1/mem"])
def test_weights_that_are_not_there(own, path):
    expected = generate(own, text="a")["text"]
    assert post(own, "/update_weights_from_disk", 400, model_path=path)["error"]["message"]
    assert generate(own, text="a")["text"] == expected


# -- the cache --------------------------------------------------------------------------------------------------------


def test_explain_says_why(own):
    prompt = "A system prompt that many requests have in common, long enough for pages. " * 3
    nothing = post(own, "/cache/explain", text=prompt)
    assert nothing["cached_tokens"] == 0
    used = generate(own, text=prompt + "one")
    told = post(own, "/cache/explain", text=prompt + "two")
    again = generate(own, text=prompt + "two")
    assert told["prompt_tokens"] == again["meta_info"]["prompt_tokens"]
    assert told["cached_tokens"] == again["meta_info"]["cached_tokens"] > 0
    assert told["reasons"]
    assert str(told["cached_tokens"]) in told["text"]
    assert used["meta_info"]["cached_tokens"] == 0
    elsewhere = post(own, "/cache/explain", text=prompt, cache_salt="other")
    assert elsewhere["cached_tokens"] == 0


def test_explain_knows_chats(own):
    messages = [{"role": "user", "content": "What is a KV cache, and why does everybody want a larger one?"}]
    own.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4})
    assert post(own, "/cache/explain", messages=messages)["cached_tokens"] > 0


def test_a_pinned_prefix_stays_and_its_time_ends(own):
    prefix = "A prefix that must stay whatever else comes through this cache. " * 4
    pinned = post(own, "/cache/pin", text=prefix, ttl=1000)
    assert 0 < pinned["prompt_tokens"] - pinned["pinned_tokens"] <= 16
    flood(own)
    assert post(own, "/cache/explain", text=prefix)["cached_tokens"] >= pinned["pinned_tokens"] - 16
    shelf = own.engine.stats()["cache"]["full"]["DEVICE"]
    assert shelf["pinned"] == pinned["pinned_tokens"]
    assert post(own, "/cache/pin", text=prefix, ttl=0.2)["pins"] == 1  # its time counts from now
    wait_until(lambda: own.engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0)  # the engine is idle all the while
    flood(own)
    assert post(own, "/cache/explain", text=prefix)["cached_tokens"] == 0
    own.engine.check()


def flood(client):
    """More prompts than the cache holds."""
    for i in range(8):
        generate(client, text=f"{i} " * 250, sampling_params={"max_new_tokens": 1})


def test_pins_of_a_prefix_and_of_its_continuation_end_apart(own):
    head = "The same beginning of two pins, some pages long, is shared by them. " * 2
    post(own, "/cache/pin", text=head, ttl=1000)
    post(own, "/cache/pin", text=head + "And this is a continuation with pages of its own. " * 2, ttl=0.3)
    both = own.engine.stats()["cache"]["full"]["DEVICE"]["pinned"]
    wait_until(lambda: own.engine.stats()["cache"]["full"]["DEVICE"]["pinned"] < both)
    assert own.engine.stats()["cache"]["full"]["DEVICE"]["pinned"] > 0
    assert post(own, "/cache/pin", text=head, ttl=0) == {
        "unpinned": True,
        "prompt_tokens": len(own.engine.encode(head)),
    }
    assert own.engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0
    assert post(own, "/cache/pin", text=head, ttl=0)["unpinned"] is False


def test_pins_leave_half_of_the_cache_to_requests(own):
    refused = post(own, "/cache/pin", 400, text="word " * 600, ttl=60)
    assert "half of the KV cache" in refused["error"]["message"]
    assert own.engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0


def test_what_is_not_cached_is_pinned_only_when_it_may_be_computed(own):
    assert (
        post(own, "/cache/pin", text="Nobody asked this before, so nothing is there.", compute=False)["pinned_tokens"]
        == 0
    )


def test_a_flush_ends_pins(own):
    post(own, "/cache/pin", text="This is pinned until somebody flushes the whole cache.", ttl=60)
    assert own.post("/reset_prefix_cache").status_code == 200
    assert own.engine.stats()["cache"]["full"]["DEVICE"]["free"] == 2048
    assert post(own, "/cache/pin", text="Another.", ttl=60)["pins"] <= 1


def test_check(own, monkeypatch):
    assert own.post("/cache/check").json()["success"] is True

    def broken():
        raise CacheBroken("page 7 has two owners")

    monkeypatch.setattr(own.engine, "check", broken)
    response = own.post("/cache/check")
    assert response.status_code == 500
    assert response.json()["error"].items() >= {"code": "cache_broken", "message": "page 7 has two owners"}.items()


def test_every_answer_is_json(client):
    for path in (
        "/health",
        "/ready",
        "/model_info",
        "/server_info",
        "/v1/loads",
        "/v1/models",
        "/is_sleeping",
        "/nothing",
    ):
        response = client.get(path)
        assert response.headers["content-type"] == "application/json"
        json.loads(response.text)
