"""Hints by their route and with requests: each is answered; what is wrong is refused before anything is computed."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from rootcellar.errors import EngineError
from rootcellar.server.callers import Caller, note_caller
from rootcellar.server.hinting import keep, taken

TEXT = (
    "The keeper of the root cellar will ask again about the jars on the third shelf, once the tool has counted them. "
    * 2
)
MESSAGES = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 2}


@pytest.fixture(autouse=True)
def nothing_is_kept(engine, client):
    yield
    client.post("/flush_cache", params={"timeout": 10})
    assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0


def test_a_prompt_is_retained_pinned_and_let_go(client, engine):
    client.post("/generate", json={"text": TEXT, "sampling_params": {"max_new_tokens": 0}})

    def hint(**hints):
        answer = client.post("/cache/hint", json={"text": TEXT, "hints": hints})
        assert answer.status_code == 200, answer.text
        return {each["hint"]: each for each in answer.json()["hints"]}

    told = hint(retain=60, next_turn=5, prefetch=True, pin=60)
    assert {name: each["answer"] for name, each in told.items()} == {
        "retain": "granted", "next_turn": "granted", "prefetch": "granted", "pin": "granted",
    }  # fmt: skip
    assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == told["pin"]["tokens"] == told["retain"]["tokens"] > 0
    told = hint(demote=True)["demote"]
    assert (told["answer"], told["tokens"] > 0) == ("granted", True)
    assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0
    assert hint(pin=0)["pin"]["answer"] == "refused"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_request_brings_its_own(client, path, stream):
    body = {
        "/generate": {"text": TEXT, "sampling_params": {"max_new_tokens": 2}},
        "/v1/completions": {"prompt": TEXT, "max_tokens": 2},
        "/v1/chat/completions": MESSAGES,
    }[path]
    answer = client.post(path, json={**body, "stream": stream, "cache_hints": {"next_turn": 30}})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    last = events[-1] if stream else answer.json()
    told = last["meta_info" if path == "/generate" else "sglext"]["cache_hints"]
    assert [(each["hint"], each["answer"]) for each in told] == [("next_turn", "granted")]
    assert told[0]["seconds"] == 45


@pytest.mark.parametrize(
    ("hints", "said"),
    [({"keep": 1}, "known are pin"), ({"pin": "x"}, "a number of seconds"), ({}, "must be an object")],
)
def test_what_is_no_hint_is_refused(client, hints, said):
    for path, body in (
        ("/cache/hint", {"text": TEXT, "hints": hints}),
        ("/v1/chat/completions", {**MESSAGES, "cache_hints": hints}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


def test_an_answer_is_told_though_the_engine_was_shut_down_before_its_hints():
    def shut(*_, **__):
        raise EngineError("the engine was shut down")

    request = SimpleNamespace(scope={})
    note_caller(request.scope, Caller("alice"))
    state = SimpleNamespace(
        engine=SimpleNamespace(prefixes=SimpleNamespace(hint=shut, keep=shut)), pinned_share=lambda caller: 1.0
    )
    arguments = {"input_ids": [1, 2], "extra_key": "", "cache_salt": ""}
    told = asyncio.run(taken(request, state, {"pin": 1}, arguments, {"output_ids": [3]}))
    assert [(each["hint"], each["answer"], each["why"]) for each in told] == [
        ("pin", "refused", "the engine was shut down")
    ]
    asyncio.run(keep(request, state, [1, 2], 10.0, arguments))
    asyncio.run(keep(request, state, [], 10.0, arguments))  # nothing is asked of the engine


def test_hints_are_for_one_conversation(client):
    for body in ({"prompt": [TEXT, TEXT]}, {"prompt": TEXT, "n": 2}):
        answer = client.post("/v1/completions", json={**body, "max_tokens": 1, "cache_hints": {"pin": 1}})
        assert answer.status_code == 400
        assert "one conversation" in answer.json()["error"]["message"]
