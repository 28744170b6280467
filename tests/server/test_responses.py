"""OpenAI's responses: items, tools, streams, and going on from one that was kept."""

import json

import httpx
import pytest
from test_tools import WEATHER

import rootcellar
from rootcellar.errors import QueueFull
from rootcellar.server.openai.protocol import message_for_template
from rootcellar.server.responses.items import chat_of
from rootcellar.server.responses.protocol import ResponsesRequest
from rootcellar.server.responses.stored import Responses
from rootcellar.server.tools import Listening
from serving import idle, on_thread

QUESTION = "What is a KV cache?"
FORCED = {
    "tools": [{"type": "function", **WEATHER["function"]}],
    "tool_choice": {"type": "function", "name": "get_weather"},
    "parallel_tool_calls": False,
    "max_output_tokens": 120,
}


@pytest.fixture(scope="module")
def server(engine):
    """A client of a server that pins nothing, so that the engine is as it was."""
    with on_thread(engine, response_pin=0) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
    idle(engine)


def ask(client, status=200, **body):
    given = {"input": QUESTION, "temperature": 0, "max_output_tokens": 12, **body}
    response = client.post("/v1/responses", json=given)
    assert response.status_code == status, response.text
    if not (body.get("stream") and status == 200):
        return response.json()
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def plain(response):
    """A response without what differs from one to the next."""
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]
    usage = {name: value for name, value in response["usage"].items() if name != "input_tokens_details"}
    return {**response, "id": "", "created_at": 0, "output": output, "usage": usage}


def test_a_response_is_what_a_chat_says(server):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
    chat = server.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 12}).json()
    answer = ask(server, instructions="Be short.", model="demo")
    (item,) = answer["output"]
    assert item["content"] == [
        {"type": "output_text", "text": chat["choices"][0]["message"]["content"], "annotations": [], "logprobs": []}
    ]
    assert item.items() >= {"type": "message", "role": "assistant", "status": "incomplete"}.items()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == 12
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + 12


@pytest.mark.parametrize("body", [{}, FORCED, {"max_output_tokens": 64}], ids=["text", "call", "whole"])
def test_a_stream_says_the_same(server, body):
    whole, pieces = ask(server, **body), ask(server, **body, stream=True)
    names = [event["type"] for event in pieces]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == f"response.{whole['status']}"
    assert plain(pieces[-1]["response"]) == plain(whole)
    items = {}
    for event in pieces:
        match event:
            case {"type": "response.output_item.added", "output_index": i, "item": item}:
                items[i] = {**item, "heard": ""}
                assert item["status"] == "in_progress"
            case {"type": "response.output_text.delta" | "response.function_call_arguments.delta", "output_index": i}:
                assert event["item_id"] == items[i]["id"]
                items[i]["heard"] += event["delta"]
            case {"type": "response.output_item.done", "output_index": i, "item": item}:
                text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
                assert items.pop(i)["heard"] == text
    assert not items
    if body is FORCED:
        (item,) = whole["output"]
        assert json.loads(item["arguments"])["city"] in ("Paris", "Rome")
        assert item["call_id"].startswith("call_")
        assert whole["status"] == "completed"


def test_a_conversation_goes_on_and_finds_itself_in_the_cache(server):
    cached, last = [], ask(server, input="The weather, again and again?", **FORCED)
    for turn in range(2):
        (call,) = last["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": f"{turn} degrees"}
        last = ask(server, input=[result], previous_response_id=last["id"], **FORCED)
        cached.append(last["usage"]["input_tokens_details"]["cached_tokens"])
    assert 0 < cached[0] < cached[1]
    assert last["previous_response_id"]


def test_what_is_stored_is_read_and_forgotten(server):
    kept = ask(server, request_id="mine")
    assert kept["id"] == "mine"
    assert server.get("/v1/responses/mine").json() == kept
    assert server.delete("/v1/responses/mine").json() == {"id": "mine", "object": "response", "deleted": True}
    for response in (server.get("/v1/responses/mine"), server.delete("/v1/responses/mine")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "response_not_found"
    loose = ask(server, store=False)
    error = ask(server, status=400, previous_response_id=loose["id"])["error"]
    assert error["code"] == "previous_response_not_found"
    assert error["param"] == "previous_response_id"


def test_a_tenant_s_responses_are_its_own(engine):
    with on_thread(engine, api_key=["alice:a", "bob:b"], response_pin=0) as url:
        alice, bob = (
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) for key in "ab"
        )
        with alice, bob:
            name = ask(alice)["id"]
            assert alice.get(f"/v1/responses/{name}").status_code == 200
            assert bob.get(f"/v1/responses/{name}").status_code == 404
            assert ask(bob, status=400, previous_response_id=name)
    # A user whose key has no name is not the administrator either.
    with on_thread(engine, api_key=["u"], admin_api_key="a", response_pin=0) as url:
        user, admin = (
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) for key in "ua"
        )
        with user, admin:
            name = ask(admin)["id"]
            assert admin.get(f"/v1/responses/{name}").status_code == 200
            assert user.get(f"/v1/responses/{name}").status_code == 404
            assert user.delete(f"/v1/responses/{name}").status_code == 404
            assert ask(user, status=400, previous_response_id=name)


@pytest.mark.parametrize("settings", [{"max_stored_responses": 0}, {"response_ttl": 0}])
def test_what_cannot_be_gone_on_from_is_not_pinned(engine, settings):
    with on_thread(engine, **settings) as url, httpx.Client(base_url=url, timeout=60) as client:
        name = ask(client, input="word " * 40)["id"]
        assert client.get(f"/v1/responses/{name}").status_code == 404
    assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0


def test_a_conversation_that_may_go_on_is_pinned_and_a_later_turn_takes_its_place():
    with (
        rootcellar.Engine(model_path="demo", max_total_tokens=2048) as engine,
        on_thread(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):

        def pinned():
            return engine.stats()["cache"]["full"]["DEVICE"]["pinned"]

        ask(client, store=False)
        assert pinned() == 0
        first = ask(client, input="Remember this well. " * 20)
        held = pinned()
        assert held > 0
        for i in range(6):
            ask(client, input=f"{i} " * 400, store=False, max_output_tokens=1)
        second = ask(client, previous_response_id=first["id"])
        used = second["usage"]
        assert used["input_tokens_details"]["cached_tokens"] > first["usage"]["total_tokens"] - 17
        assert pinned() > held
        client.post("/flush_cache?timeout=5")
        assert pinned() == 0
        engine.check()  # fmt: skip


def test_items_become_the_messages_that_templates_know():
    body = ResponsesRequest.model_validate({
        "instructions": "Be short.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "id": "m", "status": "completed",
             "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
            {"type": "function_call", "id": "f", "call_id": "c", "name": "now", "arguments": "{}"},
            {"type": "function_call", "call_id": "d", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "noon"},
            {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "one"}]},
            {"role": "assistant", "content": "Noon."},
            {"role": "assistant", "content": "One."},
        ],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "strict": True}},
        "reasoning": {"effort": "low"},
    })  # fmt: skip
    made, turns = chat_of(body, [{"role": "user", "content": "before"}])
    calls = [{"id": i, "type": "function", "function": {"name": "now", "arguments": "{}"}} for i in "cd"]
    assert [message_for_template(message) for message in made.messages] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "before"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "noon", "name": "now"},
        {"role": "tool", "tool_call_id": "d", "content": "one", "name": "now"},
        {"role": "assistant", "content": "Noon."},
        {"role": "assistant", "content": "One."},
    ]  # fmt: skip
    assert turns[0] == {"role": "user", "content": "before"}
    assert len(turns) == 7
    assert made.reasoning_effort == "low"
    assert made.response_format.json_schema.strict is True


def test_functions_of_a_namespace_are_called_by_both_names(server):
    function = {"type": "function", **WEATHER["function"]}
    space = {"type": "namespace", "name": "skies", "description": "All about the sky.", "tools": [function]}
    options = {"tools": [space], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 120}
    whole, pieces = ask(server, **options), ask(server, **options, stream=True)
    (call,) = whole["output"]
    assert (call["namespace"], call["name"]) == ("skies", "get_weather")
    assert plain(pieces[-1]["response"]) == plain(whole)
    turns = ask(
        server,
        input=[
            {"role": "user", "content": "x"},
            call,
            {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"},
        ],
        **options,
    )
    assert turns["output"][0]["namespace"] == "skies"
    body = ResponsesRequest.model_validate({"input": [{"role": "user", "content": "x"}, call], "tools": [space]})
    made = chat_of(body, [])[0]
    assert made.tools[0].function.name == "skies.get_weather"
    assert made.tools[0].function.description == "All about the sky.\n\nDoes get_weather."
    assert message_for_template(made.messages[1])["tool_calls"][0]["function"]["name"] == "skies.get_weather"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": []}, "input", "empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", "input_text"),
        ({"background": True}, "background", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        (
            {"tools": [{"type": "namespace", "name": "a" * 128, "tools": [{"type": "function", "name": "b"}]}]},
            "tools",
            "long",
        ),
        ({"tools": [{"type": "function", "name": "b"}] * 2}, "tools", "two tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"max_output_token": 5}, "max_output_token", "max_output_tokens"),
        ({"max_output_tokens": -5}, "max_output_tokens", "max_output_tokens"),
        ({"truncation": "auto"}, "truncation", "shorten"),
        ({"model": "gpt-x"}, "model", "gpt-x"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, None, "schema"),
    ],
)
def test_what_is_wrong_is_said(server, body, param, words):
    error = ask(server, status=404 if "model" in body else 400, **body)["error"]
    assert param in (None, error["param"])
    assert words in error["message"]


def test_the_oldest_make_room_and_all_have_their_time():
    now = [0.0]
    kept = Responses(10.0, 2, lambda: now[0])
    for name in "abc":
        kept.put("t", name, [{"role": "user"}], {"id": name})
        now[0] += 1
    assert kept.get("t", "a") is None
    assert kept.get("t", "b").told == b'{"id":"b"}'
    assert kept.get("u", "b") is None
    now[0] = 11.5
    assert kept.get("t", "b") is None
    assert kept.get("t", "c") is not None
    kept.put("t", "c", [], {})
    kept.put("t", "huge", [{"content": "x" * 70_000_000}], {})
    assert kept.get("t", "c") is None
    assert kept.get("t", "huge") is None
    assert kept._bytes == {"t": 0}


def test_who_stores_most_makes_room_for_what_it_stores():
    kept = Responses(10.0, 4)
    kept.put("u", "a", [], {})
    for i in range(9):
        kept.put("t", str(i), [], {})
    assert [i for i in range(9) if kept.get("t", str(i))] == [6, 7, 8]
    for i in range(9):
        kept.put("t", str(i), [{"content": "x" * 30_000_000}], {})
    assert [i for i in range(9) if kept.get("t", str(i))] == [7, 8]
    assert kept.get("u", "a") is not None


def test_results_of_calls_in_an_earlier_answer_name_their_tool():
    item = {"type": "function_call_output", "call_id": "c", "output": "noon"}
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    before = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    made, _ = chat_of(ResponsesRequest.model_validate({"input": [item]}), before)
    result = {"role": "tool", "tool_call_id": "c", "content": "noon", "name": "now"}
    assert message_for_template(made.messages[-1]) == result


def test_an_answer_is_told_though_its_thoughts_cannot_be_counted(server, monkeypatch):
    async def busy(*_):
        raise QueueFull("too many long prompts wait to be read")

    monkeypatch.setattr("rootcellar.server.responses.responses.tokenize", busy)
    monkeypatch.setattr(
        "rootcellar.server.openai.chat.listening", lambda *_, **__: Listening(thoughts="qwen3", begun=True)
    )
    used = ask(server)["usage"]
    assert used["output_tokens_details"]["reasoning_tokens"] == used["output_tokens"] > 0
