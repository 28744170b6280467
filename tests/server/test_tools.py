"""Tools on chats: offered, called, forced, streamed; what a model thinks; whole conversations over them."""

import itertools
import json

import httpx
import pytest
from test_openai import CHAT, chat

from rootcellar.server.openai.speaker import Speaker
from rootcellar.server.tools import Formats, FunctionSpec, Listening, ToolSpec, bound, listening
from rootcellar.text.speech import CALLS, Tools
from serving import on_thread


def tool(name, strict=None, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    function = {"name": name, "description": f"Does {name}.", "parameters": schema}
    return {"type": "function", "function": function if strict is None else {**function, "strict": strict}}


WEATHER = tool("get_weather", city={"enum": ["Paris", "Rome"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
CLOCK = tool("now")


def refused(client, **body):
    response = client.post("/v1/chat/completions", json={"messages": CHAT, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def said(pieces):
    """The message that the deltas of a stream make, put together as OpenAI's clients do."""
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for piece in pieces:
        for choice in piece["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for part in delta.get("tool_calls", ()):
                if part["index"] == len(message["tool_calls"]):
                    assert part["id"].startswith("call_")
                    assert part["type"] == "function"
                    message["tool_calls"].append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
                else:
                    assert part.keys() == {"index", "function"}
                    assert part["function"].keys() == {"arguments"}
                message["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
    return message


def called(message):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


FORCED = {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}


def test_a_tool_that_must_be_called_is_called_whole_and_streamed(client):
    options = {**FORCED, "parallel_tool_calls": False, "max_tokens": 120}
    (choice,) = chat(client, **options)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    ((name, given),) = called(choice["message"])
    assert name == "get_weather"
    assert given["city"] in ("Paris", "Rome")
    assert 1 <= given["days"] <= 9
    pieces = chat(client, **options, stream=True)
    streamed = said(pieces)
    assert streamed["content"] == ""
    ((told),) = streamed["tool_calls"]
    assert (told["name"], json.loads(told["arguments"])) == (name, given)
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [p["choices"][0]["finish_reason"] for p in pieces][-1] == "tool_calls"
    assert sum("tool_calls" in p["choices"][0]["delta"] for p in pieces) > 5  # in pieces, as it is made


def test_one_of_several_must_be_called(client):
    (choice,) = chat(client, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=200)["choices"]
    calls = called(choice["message"])
    assert calls
    assert {name for name, _ in calls} <= {"get_weather", "now"}
    one = chat(client, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=200, parallel_tool_calls=False)
    assert len(called(one["choices"][0]["message"])) == 1


def test_a_call_that_is_cut_off_has_what_there_is(client):
    (choice,) = chat(client, **FORCED, max_tokens=60)["choices"]
    assert choice["finish_reason"] == "length"
    calls = choice["message"].get("tool_calls", [])
    assert all(call["function"]["name"] == "get_weather" for call in calls)


@pytest.mark.parametrize("options", [{}, {"tool_choice": "none"}, {"tool_choice": "auto"}])
def test_tools_that_may_be_called_leave_the_answer_free(client, options):
    (choice,) = chat(client, tools=[WEATHER, CLOCK], **options, max_tokens=8)["choices"]
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]


def test_strict_tools_bind_calls_and_no_other_text(client):
    strict = tool("get_weather", strict=True, city={"enum": ["Paris"]})
    rendered = client.post(
        "/v1/chat/completions/render", json={"messages": CHAT, "tools": [strict, CLOCK], "max_tokens": 9}
    ).json()
    form = json.loads(rendered["sampling_params"]["structured_outputs"]["structural_tag"])["format"]
    assert form["type"] == "triggered_tags"
    assert form["triggers"] == ["<tool_call>"]
    assert [tag["content"]["json_schema"].get("properties") for tag in form["tags"]] == [
        {"city": {"enum": ["Paris"]}}, None,
    ]  # fmt: skip
    assert chat(client, tools=[strict], max_tokens=8)["choices"][0]["message"]["content"]
    asked = client.post("/tokenize", json={"messages": CHAT, "tools": [strict, CLOCK]}).json()
    assert rendered["token_ids"] == asked["tokens"]


def test_tools_are_told_to_a_template_that_knows_none(engine, client):
    history = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"a":  1}'}},
        ]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
        {"role": "tool", "tool_call_id": "b", "content": "midnight"},
    ]  # fmt: skip
    body = {"messages": history, "tools": [CLOCK]}
    text = engine.tokenizer.decode(client.post("/tokenize", json=body).json()["tokens"], skip_special_tokens=False)
    assert '{"type": "function", "function": {"name": "now"' in text
    assert '<tool_call>\n{"name": "now", "arguments": {"a":  1}}\n</tool_call><|im_end|>' in text
    shown = "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nmidnight\n</tool_response><|im_end|>"
    assert f"<|im_start|>user\n{shown}" in text
    told = [{"role": "system", "content": "Be short."}, *CHAT]
    text = engine.tokenizer.decode(client.post("/tokenize", json={"messages": told, "tools": [CLOCK]}).json()["tokens"])
    assert "Be short.\n\n# Tools" in text


def test_a_loop_of_calls_finds_more_of_itself_each_turn(client):
    """The template renders a call to the tokens that the model wrote."""
    messages = [{"role": "system", "content": "Loop."}, *CHAT]
    cached = []
    for turn in range(3):
        answer = chat(client, **{**FORCED, "messages": messages}, max_tokens=120, parallel_tool_calls=False)
        message = answer["choices"][0]["message"]
        usage = answer["usage"]
        cached.append(
            (usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        )
        (call,) = message["tool_calls"]
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": f"Sunny, {turn} degrees."}]
    for (_, whole), (found, _) in itertools.pairwise(cached):
        assert whole - 17 <= found < whole + 16  # all but the last page, and what ended the turn
    assert cached[0][0] < cached[1][0] < cached[2][0]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [CLOCK, CLOCK]}, "tools", "one name"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [CLOCK], "tool_choice": "required", "regex": "a"}, "tool_choice", "one form"),
        ({"tools": [{"type": "web_search"}]}, "tools", ""),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 129}}]}, "tools", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "a", "schema": {}}}]}, "schema", "unknown field"),
        ({"tools": [tool(f"t{i}") for i in range(513)]}, "tools", "512"),
        ({"tools": [CLOCK], "tool_choice": "maybe"}, "tool_choice", ""),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "must not name tools"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ],
)
def test_what_cannot_be_called_is_refused(client, body, param, words):
    error = refused(client, **body)
    assert error["param"] == param
    assert words in error["message"]


def test_a_schema_that_is_none_is_refused_by_its_name(client):
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": 7}}}
    error = refused(client, tools=[bad], tool_choice="required")
    assert "structural_tag" in error["message"]


def test_what_a_model_thinks_is_told_apart(engine):
    """The embedded model thinks nothing: with this parser all that it says is thought."""
    with on_thread(engine, reasoning_parser="deepseek-r1") as url, httpx.Client(base_url=url, timeout=60) as client:
        plain = chat(client, max_tokens=8, separate_reasoning=False)["choices"][0]["message"]
        message = chat(client, max_tokens=8)["choices"][0]["message"]
        assert message == {
            "role": "assistant", "content": "", "refusal": None, "reasoning_content": plain["content"].strip(),
        }  # fmt: skip
        streamed = said(chat(client, max_tokens=8, stream=True))
        assert streamed == {"content": "", "reasoning_content": message["reasoning_content"], "tool_calls": []}
        assert "reasoning_content" not in chat(client, max_tokens=8, include_reasoning=False)["choices"][0]["message"]
        form = {"regex": "yes|no"}
        assert chat(client, max_tokens=8, **form)["choices"][0]["message"]["content"] in ("yes", "no")
        usage = chat(client, max_tokens=8, **FORCED)["usage"]
        assert usage["completion_tokens"] == 8


def test_a_speaker_tells_thoughts_text_and_calls_as_deltas():
    how = Listening(tools=Tools({"f": {}}), calls="hermes", thoughts="qwen3")
    speaker = Speaker(how)
    text = '<think>\nhm\n</think>\n\nWell.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    deltas = [speaker.hear(character, ended=False) for character in text] + [speaker.hear("", ended=True)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Well."
    message = speaker.message()
    assert message["reasoning_content"] == "hm"
    assert message["content"] == "Well."
    assert called(message) == [("f", {"a": 1})]
    assert Listening().plain
    assert Listening(tools=how.tools).plain


# Each compiles programs for its own lengths; the others' forms are tried at night.
BOUND = ("hermes", "listed", "mistral")


@pytest.mark.parametrize(
    "name", [*BOUND, *(pytest.param(name, marks=pytest.mark.long) for name in CALLS if name not in BOUND)]
)
def test_each_family_binds_calls_in_its_own_way(name, engine):
    """What the grammar of a family lets through is read as the call that it forces."""
    function = FunctionSpec(name="f", parameters={"type": "object", "properties": {}, "additionalProperties": False})
    frame = CALLS[name].frame
    form = bound(CALLS[name], [function], must=True, parallel=False, found=None, prompt="")
    if frame is None:
        assert form is None
        return
    tag = json.dumps({"type": "structural_tag", "format": form})
    answer = engine.generate(
        prompt="x", sampling_params={"structural_tag": tag, "temperature": 0, "max_new_tokens": 200}
    )
    assert answer["text"] == frame.before + frame.begin.replace("NAME", "f") + "{}" + frame.end + frame.after
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    speaker = Speaker(Listening(tools=Tools({"f": {}}), calls=name))
    speaker.hear(answer["text"], ended=True)
    assert [(call.name, call.arguments) for call in speaker.calls] == [("f", "{}")]


def test_special_tokens_that_mark_calls_are_kept_for_the_parser_and_others_are_not():
    formats = Formats("mistral", None, frozenset({"[TOOL_CALLS]", "</s>", "<s>"}))
    tools = [ToolSpec.model_validate(CLOCK)]
    options = {"prompt": "", "parallel": True, "thoughts": True, "show_thoughts": True, "has_form": False}
    how = listening(formats, tools, "auto", **options, skips_special=True)
    assert how.sampling == {"skip_special_tokens": False}
    assert how.dropped == ("</s>", "<s>")
    assert len(how.call_id("call_")) == 9
    assert listening(formats, tools, "auto", **options, skips_special=False).dropped == ()
    assert listening(formats, None, None, **options, skips_special=True).sampling == {}


def test_thoughts_may_come_before_a_call_that_must():
    frame = CALLS["hermes"]
    function = FunctionSpec(name="f")
    options = {"must": True, "parallel": True, "found": "qwen3"}
    first = [
        bound(frame, [function], **options, prompt=prompt)["elements"][0]["type"]
        for prompt in ("assistant\n", "<think>\n", "<think>\n\n</think>\n\n")
    ]
    assert first == ["optional", "sequence", "const_string"]


def test_structural_tags_by_sglangs_older_form(client):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    tag = {"structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}], "triggers": ["<f>"]}
    for bad, words in (
        ({"format": {"type": "tag"}}, "begin"),
        ({"format": {"type": "what"}}, "no format is understood"),
        ({"format": {"type": "triggered_tags", "triggers": [], "tags": []}}, "triggers"),
        ({"format": {"type": "sequence", "elements": [{"type": "json_schema", "json_schema": 7}]}}, "object"),
    ):
        assert words in refused(client, structural_tag=bad)["message"]
    answer = chat(client, structural_tag=tag, max_tokens=8)
    assert answer["choices"][0]["message"]["content"]
    whole = {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": schema}, "end": "</f>"}
    text = chat(client, structured_outputs={"structural_tag": {"format": whole}}, max_tokens=40)["choices"][0]
    assert json.loads(text["message"]["content"].removeprefix("<f>").removesuffix("</f>")).keys() == {"a"}
