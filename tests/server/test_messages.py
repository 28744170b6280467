"""Anthropic's messages: blocks, tools, streams, what is kept, errors."""

import json

import httpx
import pytest
from test_tools import CLOCK, WEATHER

import rootcellar
from rootcellar.server.anthropic.answers import BlockWriter
from rootcellar.server.anthropic.blocks import Mark, chat_of
from rootcellar.server.anthropic.protocol import MessagesRequest
from rootcellar.server.openai.protocol import message_for_template
from rootcellar.server.openai.speaker import Speaker
from rootcellar.server.tools import Listening
from rootcellar.text.speech import Tools
from serving import on_thread

USER = {"role": "user", "content": "What is a KV cache?"}
TOOLS = [
    {"name": t["function"]["name"], "description": "x", "input_schema": t["function"]["parameters"]}
    for t in (WEATHER, CLOCK)
]
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
HIDDEN = {"type": "redacted_thinking", "data": "x"}
FORCED = {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}}


def ask(client, path="/v1/messages", status=200, **body):
    given = {"messages": [USER], "temperature": 0, "max_tokens": 12, **body}
    given = {
        name: value
        for name, value in given.items()
        if path == "/v1/messages" or name not in ("temperature", "max_tokens")
    }
    response = client.post(path, json=given)
    assert response.status_code == status, response.text
    return events(response) if body.get("stream") and status == 200 else response.json()


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def put_together(found):
    """The message that the events of a stream make, as Anthropic's client puts it together."""
    assert found[0]["type"] == "message_start"
    assert found[-1]["type"] == "message_stop"
    message = found[0]["message"]
    assert message["content"] == []
    opened = None
    for event in found[1:-1]:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert opened is None
                assert index == len(message["content"])
                message["content"].append({**block, "json": ""})
                opened = index
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                assert index == opened
                block = message["content"][index]
                match delta:
                    case {"type": "text_delta", "text": text}:
                        block["text"] += text
                    case {"type": "thinking_delta", "thinking": text}:
                        block["thinking"] += text
                    case {"type": "input_json_delta", "partial_json": text}:
                        block["json"] += text
            case {"type": "content_block_stop", "index": index}:
                assert index == opened
                opened = None
            case {"type": "message_delta", "delta": delta, "usage": usage}:
                assert opened is None
                message |= delta
                message["usage"] |= usage
    for block in message["content"]:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
    return message


def without_names(message):
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    usage = {name: value for name, value in message["usage"].items() if name == "output_tokens"}
    return {**message, "id": "", "content": content, "usage": usage}


def test_a_message_is_what_a_chat_says(client):
    chat = client.post("/v1/chat/completions", json={"messages": [USER], "temperature": 0, "max_tokens": 12}).json()
    answer = ask(client, model="demo")
    assert answer["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    assert (
        answer.items() >= {"type": "message", "role": "assistant", "model": "demo", "stop_reason": "max_tokens"}.items()
    )
    assert answer["stop_sequence"] is None
    used = answer["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert used["output_tokens"] == 12
    assert ask(client, path="/v1/messages/count_tokens") == {"input_tokens": chat["usage"]["prompt_tokens"]}


@pytest.mark.parametrize(
    "body",
    # Answers of 32 tokens: pieces that wait while another is sent go together, and of few tokens all might.
    [{"max_tokens": 60}, {**FORCED, "max_tokens": 120}, {"stop_sequences": ["again"], "max_tokens": 60}],
    ids=["text", "tool", "stop"],
)
def test_a_stream_says_the_same(client, body):
    whole, pieces = ask(client, **body), ask(client, **body, stream=True)
    assert without_names(put_together(pieces)) == without_names(whole)
    assert sum(event["type"] == "content_block_delta" for event in pieces) > 2
    if "stop_sequences" in body:
        assert whole["stop_reason"] == "stop_sequence"
        assert whole["stop_sequence"] == "again"


def test_a_text_is_one_block_though_its_end_was_held_back():
    """The end of an answer that may have begun a call, or is white space, is told last."""
    reading = Listening(tools=Tools({"now": {}}), calls="hermes")
    for text in ("a <", "a \n", "a"):
        speaker = Speaker(reading)
        writer = BlockWriter(speaker)
        told = [*writer.write(speaker.events(text, ended=True)), *writer.close()]
        assert writer.content == [{"type": "text", "text": text}]
        assert speaker.text == text
        assert told[-1].startswith(b"event: content_block_stop")
    speaker = Speaker(reading)
    writer = BlockWriter(speaker)
    called = "".join(f'<tool_call>{{"name": "now", "arguments": {{"a": {i}}}}}</tool_call>' for i in range(2))
    told = [*writer.write(speaker.events(called, ended=True)), *writer.close()]
    assert [(block["name"], block["input"]) for block in writer.content] == [("now", {"a": 0}), ("now", {"a": 1})]


def test_tools_are_called_and_their_results_go_on_from_the_cache(client):
    messages, cached = [{"role": "user", "content": "The weather, over and over?"}], []
    for turn in range(3):
        answer = ask(client, **{**FORCED, "messages": messages}, system="Weather only.", max_tokens=120)
        assert answer["stop_reason"] == "tool_use"
        (call,) = answer["content"]
        assert call["id"].startswith("toolu_")
        assert call["input"]["city"] in ("Paris", "Rome")
        result = {
            "type": "tool_result",
            "tool_use_id": call["id"],
            "content": [{"type": "text", "text": f"{turn} degrees"}],
        }
        messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
        cached.append(answer["usage"]["cache_read_input_tokens"])
    assert 0 == cached[0] < cached[1] < cached[2]


def chat(**body):
    made, marks = chat_of(MessagesRequest.model_validate({"messages": [USER], "max_tokens": 5, **body}))
    return made, [message_for_template(message) for message in made.messages], marks


def test_blocks_become_the_messages_that_templates_know():
    kept = {"type": "ephemeral", "ttl": "1h"}
    _, messages, marks = chat(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=4f;"},
            {"type": "text", "text": "Be short."},
            {"type": "text", "text": "Be right.", "cache_control": kept},
        ],
        tools=[{**TOOLS[0], "cache_control": {"type": "ephemeral"}}],
        messages=[
            USER,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "d"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "now", "input": {"é": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "noon", "is_error": True},
                {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral", "ttl": "5m"}},
            ]},
        ],
    )  # fmt: skip
    assert messages == [
        {"role": "system", "content": "Be short.\nBe right."},
        USER,
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"é": 1}'}},
        ]},
        {"role": "tool", "tool_call_id": "a", "content": "Error: noon", "name": "now"},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert marks == [Mark(0, 300), Mark(1, 3600), Mark(5, 300)]


def test_a_system_that_speaks_after_a_call_is_told_in_a_turn_without_a_text():
    called = {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "now", "input": {}}]}
    turn = chat(messages=[called, {"role": "system", "content": "Hurry."}])[1][0]
    assert turn["content"] == "<system-reminder>\nHurry.\n</system-reminder>"


def test_a_system_that_speaks_later_is_told_in_the_user_s_turn():
    later = {"role": "system", "content": "Hurry."}
    spoken = [later, USER, later, {"role": "assistant", "content": "Yes."}, later]
    assert chat(messages=spoken)[1] == [
        later,
        {"role": "user", "content": f"{USER['content']}\n<system-reminder>\nHurry.\n</system-reminder>"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "<system-reminder>\nHurry.\n</system-reminder>"},
    ]


def test_settings_are_a_chat_s():
    made, _, marks = chat(
        thinking={"type": "disabled"}, output_config={"effort": "max", "format": {"type": "json_schema", "schema": {}}},
        tool_choice={"type": "any"}, tools=TOOLS, stop_sequences=["x"], cache_control={"type": "ephemeral"}, top_k=3,
        messages=[USER, {"role": "assistant", "content": "A KV"}],
    )  # fmt: skip
    assert made.chat_template_kwargs == {"enable_thinking": False, "thinking": False}
    assert made.include_reasoning is False
    assert made.reasoning_effort == "high"
    assert made.response_format.type == "json_schema"
    assert (made.tool_choice, made.parallel_tool_calls) == ("required", True)
    assert (made.stop, made.top_k, made.max_tokens) == (["x"], 3, 5)
    assert made.continue_final_message is True
    assert marks == [Mark(2, 300)]


def test_the_assistant_s_last_message_is_gone_on_with(client):
    answer = ask(client, messages=[USER, {"role": "assistant", "content": "A KV cache"}])
    assert answer["content"][0]["text"].startswith(" keeps")


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "claude-x"}, 404, "not_found_error", "claude-x"),
        ({"temprature": 1}, 400, "invalid_request_error", "Did you mean 'temperature'"),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error", "tools"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "needs tools"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, 400, "invalid_request_error", "image"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "invalid_request_error", "tokens"),
        ({"messages": [{"role": "user", "content": [RESULT] * 5000}]}, 400, "invalid_request_error", "5000 messages"),
        ({"messages": [{"role": "assistant", "content": [HIDDEN]}]}, 400, "invalid_request_error", "say nothing"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, 400, "invalid_request_error", "cache_control"),
    ],
)  # fmt: skip
def test_errors_are_anthropic_s(client, body, status, kind, words):
    error = ask(client, status=status, **body)
    assert error["type"] == "error"
    assert error["error"]["type"] == kind
    assert words in error["error"]["message"]


def test_keys_by_anthropic_s_header(engine):
    with on_thread(engine, api_key="u") as url:
        for headers, status in (({"x-api-key": "u"}, 200), ({"x-api-key": "v"}, 401), ({}, 401)):
            response = httpx.post(
                f"{url}/v1/messages/count_tokens", json={"messages": [USER]}, headers=headers, timeout=60
            )
            assert response.status_code == status
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.json()["type"] == "error"


def test_what_is_to_be_kept_outlasts_a_flood_and_no_longer_than_it_should():
    """A marked prefix is pinned for its time; a longer one of the same conversation takes its place."""
    system = [{"type": "text", "text": "Remember this well. " * 30, "cache_control": {"type": "ephemeral"}}]
    with (
        rootcellar.Engine(model_path="demo", max_total_tokens=2048) as engine,
        on_thread(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        first = ask(client, system=system)["usage"]
        created = first["cache_creation_input_tokens"]
        assert first["cache_read_input_tokens"] == 0
        assert created > 100
        assert first["input_tokens"] > 0
        pinned = engine.stats()["cache"]["full"]["DEVICE"]["pinned"]
        assert pinned > 0
        for i in range(6):
            ask(client, messages=[{"role": "user", "content": f"{i} " * 400}], max_tokens=1)
        again = ask(client, system=system, stream=True)[0]["message"]["usage"]
        assert again["cache_read_input_tokens"] >= created - 16
        assert again["cache_creation_input_tokens"] <= 16
        assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == pinned
        longer = [USER, {"role": "assistant", "content": "So."}, {"role": "user", "content": [
            {"type": "text", "text": "Go on.", "cache_control": {"type": "ephemeral"}}]}]  # fmt: skip
        ask(client, system=system, messages=longer)
        assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] > pinned
        client.post("/flush_cache?timeout=5")
        assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0
        engine.check()


def test_a_prompt_that_is_too_long_to_be_kept_is_answered_all_the_same():
    marked = [{"role": "user", "content": [
        {"type": "text", "text": "word " * 180, "cache_control": {"type": "ephemeral"}}]}]  # fmt: skip
    with (
        rootcellar.Engine(model_path="demo", max_total_tokens=512) as engine,
        on_thread(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert ask(client, messages=marked, max_tokens=2)["content"]
        assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == 0
