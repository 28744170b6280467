"""Every field that a client may send: done, refused by name, or listed as one that changes nothing."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from test_openai import CHAT, chat, complete, events

from rootcellar.server.anthropic.protocol import MessagesRequest
from rootcellar.server.fields import (
    CHAT_IGNORED,
    CHAT_REFUSED,
    CONTROL_IGNORED,
    CONTROL_REFUSED,
    IGNORED,
    REFUSED,
    markdown,
    tables,
)
from rootcellar.server.native.generate import TokenizeRequest
from rootcellar.server.native.protocol import GenerateRequest
from rootcellar.server.openai.forms import StructuredOutputs
from rootcellar.server.openai.protocol import ChatRequest, CompletionRequest
from rootcellar.server.parsing import OrjsonRequest
from rootcellar.server.responses.protocol import ResponsesRequest

ROUTES = {
    "/v1/completions": {"prompt": "What is a", "max_tokens": 3, "temperature": 0},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 3, "temperature": 0},
    "/generate": {"text": "What is a", "sampling_params": {"max_new_tokens": 3, "temperature": 0}},
}


def refused(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def said(answer):
    """What an answer of any of the three routes says."""
    if "choices" not in answer:
        return answer["text"]
    return [choice.get("text") or choice["message"]["content"] for choice in answer["choices"]]


# -- unknown, ignored, refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "name", "near"),
    [
        ("/v1/completions", {"max_token": 5}, "max_token", "max_tokens"),
        ("/v1/completions", {"stream_options": {"include_usge": True}}, "include_usge", "include_usage"),
        ("/v1/chat/completions", {"max_complete_tokens": 5}, "max_complete_tokens", "max_completion_tokens"),
        ("/v1/chat/completions", {"Temperature": 0}, "Temperature", "temperature"),
        ("/v1/chat/completions", {"max_token": None}, "max_token", "max_tokens"),
        ("/v1/chat/completions", {"structured_outputs": {"jsno": {}}}, "jsno", "json"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object", "schema": {}}}, "schema", "json_schema"),
        ("/v1/chat/completions/render", {"max_token": 5}, "max_token", "max_tokens"),
        ("/v1/completions/render", {"promt": 5}, "promt", "prompt"),
        ("/generate", {"input_id": [1]}, "input_id", "input_ids"),
        ("/generate", {"sampling_param": {}}, "sampling_param", "sampling_params"),
        ("/tokenize", {"prompts": "a"}, "prompts", "prompt"),
        ("/detokenize", {"token": [1]}, "token", "tokens"),
        ("/cache/explain", {"input_id": [1]}, "input_id", "input_ids"),
        ("/cache/pin", {"tll": 5}, "tll", "ttl"),
        ("/release_memory_occupation", {"tag": ["kv_cache"]}, "tag", "tags"),
        ("/resume_memory_occupation", {"tag": ["kv_cache"]}, "tag", "tags"),
        ("/pause_generation", {"modes": "abort"}, "modes", "mode"),
        ("/abort_request", {"ri": "x"}, "ri", "rid"),
        ("/continue_generation", {"torch_emty_cache": True}, "torch_emty_cache", None),
        ("/update_weights_from_disk", {"model_pth": "x"}, "model_pth", "model_path"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(client, path, body, name, near):
    error = refused(client, path, {**ROUTES.get(path, {}), **body})
    assert error["param"] == name
    assert f"unknown field {name!r}. " + (f"Did you mean {near!r}?" if near else "Leave it out") in error["message"]


def test_a_field_that_is_near_to_nothing_is_refused_as_well(client):
    error = refused(client, "/v1/completions", {**ROUTES["/v1/completions"], "x" * 3000: 1})
    assert "docs/fields.md" in error["message"]
    assert len(error["message"]) < 300


def test_the_documentation_lists_every_field():
    page = (Path(__file__).parents[2] / "docs" / "fields.md").read_text(encoding="utf-8")
    assert markdown() in page
    for asked in (MessagesRequest, ResponsesRequest):
        assert tables(asked.ignored, asked.refused) in page
    routes = (CompletionRequest, ChatRequest, GenerateRequest, TokenizeRequest, MessagesRequest, ResponsesRequest)
    for body in (*routes, StructuredOutputs):
        for name, field in body.model_fields.items():
            assert f"`{field.alias or name}`" in page, name


@pytest.mark.parametrize("path", ROUTES)
def test_what_changes_nothing_is_taken(client, path):
    plain = client.post(path, json=ROUTES[path]).json()
    for value in ({"a": [1]}, "x", 5, True, None):
        response = client.post(path, json={**ROUTES[path], **dict.fromkeys(IGNORED, value)})
        assert response.status_code == 200, response.text
        assert said(response.json()) == said(plain)
    assert all(len(reason) > 15 for reason in IGNORED.values())


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing(client, path):
    nothing = {name: value for name, field in REFUSED.items() for value in (None, *field.nothing)}
    assert client.post(path, json={**ROUTES[path], **nothing}).status_code == 200
    for name, field in REFUSED.items():
        for value in ({"a": 1}, ["x"], "xyz", 7.5):
            error = refused(client, path, {**ROUTES[path], name: value})
            assert error["param"] == name
            assert error["message"] == f"{name} is not supported: {field.instead}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_beam_search", True), ("return_hidden_states", True), ("suffix", "b"), ("best_of", 3), ("lora_path", "x"),
     ("functions", [{"name": "f"}]), ("function_call", "f"), ("length_penalty", 2)],
)  # fmt: skip
def test_refusals_of_both_openai_routes(client, name, value):
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert refused(client, path, {**ROUTES[path], name: value})["param"] == name


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_tools_belong_to_chats(client, path):
    nothing = {**dict.fromkeys(CHAT_IGNORED, True), "tools": [], "tool_choice": "auto"}
    assert client.post(path, json={**ROUTES[path], **nothing}).status_code == 200
    for name in CHAT_REFUSED:
        error = refused(client, path, {**ROUTES[path], name: ["x"]})
        assert error["message"] == f"{name} is not supported: {CHAT_REFUSED[name].instead}"


def test_sampling_parameters_of_generate(client):
    def ask(**params):
        return client.post("/generate", json={"text": "What is a", "sampling_params": {"max_new_tokens": 3, **params}})

    as_slime = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "stop": None, "stop_token_ids": None}
    as_slime |= {"skip_special_tokens": True, "no_stop_trim": True, "spaces_between_special_tokens": False}
    assert ask(**as_slime).status_code == 200
    assert ask(stop_regex=[], custom_params=None, stream_interval=4).status_code == 200
    for name, value in (("stop_regex", "a+"), ("custom_params", {"a": 1})):
        response = ask(**{name: value})
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(f"{name} is not supported: ")
    assert "Did you mean 'temperature'" in ask(temprature=1).json()["error"]["message"]


def test_what_sglangs_trainers_send_to_control(client):
    for value in (True, "x", 5, None):
        body = dict.fromkeys(CONTROL_IGNORED, value)
        assert client.post("/continue_generation", json=body).status_code == 200
        assert client.post("/abort_request", json={"rid": "nobody", **body}).status_code == 200
        assert client.post("/resume_memory_occupation", json=body).status_code == 200
    assert client.post("/continue_generation", json={"flush_cache": True, "manifest": None}).status_code == 200
    for name, field in CONTROL_REFUSED.items():
        error = refused(client, "/update_weights_from_disk", {"model_path": "demo", name: False})
        assert error["message"] == f"{name} is not supported: {field.instead}"


# -- forms of an answer -----------------------------------------------------------------------------------------------

OBJECT = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
OBJECT["additionalProperties"] = False
ODD = ["a b", 'say "no"', "x|y", "(z)*", "\\d+", "naïve 你好", "tab\tand\nline", "$^.[]{}?+-#&~/'"]


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"guided_json": OBJECT}, lambda text: json.loads(text)["ok"] in (True, False)),
        ({"guided_json": json.dumps(OBJECT)}, lambda text: json.loads(text)["ok"] in (True, False)),
        ({"json_schema": OBJECT}, lambda text: json.loads(text)["ok"] in (True, False)),
        ({"structured_outputs": {"json": OBJECT}}, lambda text: json.loads(text)["ok"] in (True, False)),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 5}, lambda text: text.startswith("{")),
        ({"guided_regex": "[a-c]{4}"}, re.compile("[a-c]{4}").fullmatch),
        ({"structured_outputs": {"regex": "[a-c]{4}"}}, re.compile("[a-c]{4}").fullmatch),
        ({"guided_choice": ["shared", "private"]}, ["shared", "private"].__contains__),
        ({"structured_outputs": {"choice": ["shared", "private"]}}, ["shared", "private"].__contains__),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, ["yes", "no"].__contains__),
        ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, ["yes", "no"].__contains__),
        *(({"guided_choice": [odd]}, odd.__eq__) for odd in ODD),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_an_answer_follows_its_form_by_vllms_names(client, fields, fits):
    body = {"max_tokens": 60, "temperature": 1.0, "seed": 3, **fields}
    (choice,) = complete(client, prompt="Is a page shared? ", **{**body, "ignore_eos": False})["choices"]
    assert fits(choice["text"])
    (choice,) = chat(client, **body)["choices"]
    assert fits(choice["message"]["content"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": OBJECT, "regex": "a"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "x", "regex": "a"}}, "structured_outputs.regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs.regex",
        ),
    ],
)
def test_forms_that_are_none_or_too_many(client, fields, param):
    assert refused(client, "/v1/chat/completions", {"messages": CHAT, **fields})["param"] == param


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"json": {"type": 7}}}, "structured_outputs.json"),
        ({"guided_grammar": "root = what"}, "guided_grammar"),
        ({"regex": "("}, "regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, "response_format"),
    ],
)
def test_a_form_that_is_not_understood_is_called_what_the_client_calls_it(client, fields, name):
    for path in ("/v1/completions", "/v1/chat/completions"):
        message = refused(client, path, {**ROUTES[path], **fields})["message"]
        assert message.startswith(f"{name} "), message


def test_the_stop_string_may_stay(client):
    plain = complete(client, prompt="What is a KV cache?", max_tokens=40)["choices"][0]["text"]
    word = plain.split()[3]
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        options = {"prompt": "What is a KV cache?", "max_tokens": 40, "stop": word, name: True}
        (choice,) = complete(client, **options)["choices"]
        assert choice["text"] == plain[: plain.index(word) + len(word)]
        pieces = complete(client, **options, stream=True)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]
    both = {"include_stop_str_in_output": True, "no_stop_trim": False}
    body = {**ROUTES["/v1/completions"], **both}
    assert refused(client, "/v1/completions", body)["param"] == "include_stop_str_in_output"


# -- token ids and logprobs -------------------------------------------------------------------------------------------


def test_token_ids_of_prompt_and_answer(client, engine):
    prompts = ["What is a", "The cache"]
    whole = complete(client, prompt=prompts, n=2, temperature=1, seed=1, return_token_ids=True)
    pieces = complete(client, prompt=prompts, n=2, temperature=1, seed=1, return_token_ids=True, stream=True)
    for choice in whole["choices"]:
        assert choice["prompt_token_ids"] == engine.encode(prompts[choice["index"] // 2])
        assert len(choice["token_ids"]) == 12
        assert engine.tokenizer.decode(choice["token_ids"]) == choice["text"]
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert all("prompt_token_ids" not in piece for piece in mine[1:])
        assert [id for piece in mine for id in piece["token_ids"]] == choice["token_ids"]
    assert "token_ids" not in complete(client, prompt="What")["choices"][0]


@pytest.mark.parametrize("name", ["return_token_ids", "return_prompt_token_ids"])
def test_token_ids_of_a_chat(client, engine, name):
    whole = chat(client, max_tokens=8, **{name: True})
    pieces = chat(client, max_tokens=8, stream=True, **{name: True})
    ids = whole["prompt_token_ids"]
    assert ids == client.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert [piece.get("prompt_token_ids") for piece in pieces] == [ids] + [None] * (len(pieces) - 1)
    if name == "return_token_ids":
        (choice,) = whole["choices"]
        assert engine.tokenizer.decode(choice["token_ids"]) == choice["message"]["content"]
        assert [id for piece in pieces for id in piece["choices"][0]["token_ids"]] == choice["token_ids"]
    else:
        assert "token_ids" not in whole["choices"][0]


def test_prompt_logprobs_in_vllms_form(client, engine):
    ids = engine.encode("What is a KV cache")
    meta = engine.generate(
        input_ids=ids,
        sampling_params={"temperature": 0, "max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
    )["meta_info"]
    for k, logprobs in ((2, None), (0, None), (1, 3), (3, 1)):
        answer = complete(client, prompt=ids, max_tokens=2, prompt_logprobs=k, logprobs=logprobs)
        (choice,) = answer["choices"]
        shown = choice["prompt_logprobs"]
        assert shown[0] is None
        assert len(shown) == len(ids)
        for entries, (value, id, text), row in list(
            zip(shown, meta["input_token_logprobs"], meta["input_top_logprobs"], strict=True)
        )[1:]:
            assert entries.keys() == {str(id), *(str(other) for _, other, _ in row[:k])}
            assert entries[str(id)]["logprob"] == pytest.approx(value, abs=1e-4)
            assert entries[str(id)]["decoded_token"] == text
            for rank, (_, other, _) in enumerate(row[:k], 1):
                assert entries[str(other)]["rank"] == rank
        assert (choice["logprobs"] is None) == (logprobs is None)
        if logprobs:
            assert all(len(row) <= logprobs + 1 for row in choice["logprobs"]["top_logprobs"])
    whole = chat(client, max_tokens=2, prompt_logprobs=1)
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert whole["choices"][0]["logprobs"] is None
    for bad in ({"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": 1, "stream": True}):
        assert refused(client, "/v1/completions", {"prompt": "a", **bad})["param"] == "prompt_logprobs"


# -- cache reports of SGLang's benchmark ------------------------------------------------------------------------------


def benchmarked(response):
    """What `sglang.benchmark.serving` (0.5.23) reads of a stream: cached tokens, text; it fails as that does."""
    cached, text = 0, ""
    chatting = response.request.url.path == "/v1/chat/completions"
    for data in events(response):
        details = (data.get("sglext") or {}).get("cached_tokens_details")
        if details:
            cached = sum(details.get(tier) or 0 for tier in ("device", "host", "storage"))
        if chatting:
            choices = data.get("choices") or []
            text += (choices[0].get("delta") or {}).get("content") or "" if choices else ""
        else:
            text += data["choices"][0]["text"]
    return cached, text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_cache_reports_of_sglangs_benchmark(client, path):
    long = "A prompt that is a few pages long, so that the second request finds it. " * 3
    prompt = {"prompt": long} if path == "/v1/completions" else {"messages": [{"role": "user", "content": long}]}
    body = {**prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_cached_tokens_details": True}
    body["cache_salt"] = f"bench {path}"
    first, second = (benchmarked(client.post(path, json={**body, "stream": True})) for _ in range(2))
    whole = client.post(path, json=body).json()
    assert first[0] == 0
    assert second[0] > 16
    assert second[1] == said(whole)[0]
    assert sum(whole["sglext"]["cached_tokens_details"].values()) == second[0]
    pieces = events(client.post(path, json={**body, "stream": True}))
    assert [bool(piece.get("sglext")) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    if path == "/v1/chat/completions":
        assert pieces[-1]["choices"] == []
        assert "usage" not in pieces[-1]


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["moderator", "User", "", "function"])
def test_unknown_roles_are_refused(client, role):
    error = refused(client, "/v1/chat/completions", {"messages": [{"role": role, "content": "x"}]})
    assert "'developer'" in error["message"]
    assert error["param"] == "messages"


def test_a_developer_speaks_as_the_system_where_the_template_knows_none(client):
    answers = [
        chat(
            client, messages=[{"role": role, "content": "Answer shortly."}, *CHAT], max_tokens=8, return_token_ids=True
        )
        for role in ("system", "developer")
    ]
    assert answers[0]["prompt_token_ids"] == answers[1]["prompt_token_ids"]


def test_the_final_message_is_continued(client, engine):
    start = "A KV cache keeps"
    messages = [*CHAT, {"role": "assistant", "content": start}]
    rendered = engine.chat_prompt(CHAT) + start
    options = {"messages": messages, "continue_final_message": True, "max_tokens": 12}
    answer = chat(client, **options, return_token_ids=True)
    assert engine.tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False) == rendered
    (expected,) = complete(client, prompt=rendered, ignore_eos=False)["choices"]
    assert answer["choices"][0]["message"]["content"] == expected["text"]
    assert engine.chat_prompt(messages, continue_final_message=True) == rendered
    assert chat(client, **options, echo=True)["choices"][0]["message"]["content"] == start + expected["text"]
    pieces = chat(client, **options, echo=True, stream=True)
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == start + expected["text"]


def test_without_a_generation_prompt(client, engine):
    answer = chat(client, add_generation_prompt=False, max_tokens=2, return_token_ids=True)
    text = engine.chat_prompt(CHAT, add_generation_prompt=False)
    assert engine.tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("messages", "more", "said"),
    [
        (CHAT, {"add_generation_prompt": True}, "add_generation_prompt"),
        ([*CHAT, {"role": "assistant", "content": None}], {}, "content is a text"),
        ([*CHAT, {"role": "assistant", "content": "x", "tool_calls": [{"type": "function"}]}], {}, "tool calls"),
    ],
)
def test_what_cannot_be_continued(client, messages, more, said):
    body = {"messages": messages, "continue_final_message": True, **more}
    for path in ("/v1/chat/completions", "/tokenize"):
        assert said in refused(client, path, body)["message"]


def test_reasoning_effort_reaches_the_template(client, engine, monkeypatch):
    seen = {}
    chat_of = engine.tokenizer.chat
    monkeypatch.setattr(engine.tokenizer, "chat", lambda m, **o: seen.update(o["variables"]) or chat_of(m, **o))
    chat(client, reasoning_effort="low", max_tokens=1, chat_template_kwargs={"enable_thinking": False})
    assert seen.items() >= {"reasoning_effort": "low", "enable_thinking": False}.items()


# -- what a prompt becomes --------------------------------------------------------------------------------------------


def test_tokenize_takes_messages(client, engine):
    answer = client.post("/tokenize", json={"messages": CHAT, "model": "demo"}).json()
    text = engine.chat_prompt(CHAT)
    assert engine.tokenizer.decode(answer["tokens"], skip_special_tokens=False) == text
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] > answer["count"]
    told = client.post("/tokenize", json={"prompt": "What is", "return_token_strs": True}).json()
    assert "".join(told["token_strs"]) == "What is"
    bare = client.post("/tokenize", json={"messages": CHAT, "add_generation_prompt": False}).json()
    assert answer["tokens"][: bare["count"]] == bare["tokens"]
    assert bare["count"] < answer["count"]
    assert "not both" in refused(client, "/tokenize", {"messages": CHAT, "prompt": "a"})["message"]
    assert "prompt" in refused(client, "/tokenize", {})["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_render_says_what_would_be_computed(client, path):
    body = {**ROUTES[path], "cache_salt": "s", "stop": ["x"], "model": "demo"}
    answer = client.post(f"{path}/render", json=body).json()
    computed = client.post(path, json={**body, "return_token_ids": True}).json()
    (one,) = answer if path == "/v1/completions" else [answer]
    expected = computed.get("prompt_token_ids") or computed["choices"][0]["prompt_token_ids"]
    assert one["token_ids"] == expected
    assert one["features"] is None
    assert one["model"] == "demo"
    assert one["cache_salt"] == "s"
    assert one["stream"] is False
    assert one["request_id"]
    assert one["sampling_params"].items() >= {"max_tokens": 3, "temperature": 0.0, "stop": ["x"], "n": 1}.items()


def test_render_of_several_prompts_and_of_what_is_wrong(client, engine):
    answer = client.post("/v1/completions/render", json={"prompt": ["What is", "The"]}).json()
    assert [each["token_ids"] for each in answer] == [engine.encode("What is"), engine.encode("The")]
    assert [each["sampling_params"]["max_tokens"] for each in answer] == [16, 16]
    for body in (
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "max_tokens": 10**6},
        {"prompt": [5000]},
        {"prompt": ""},
    ):
        assert refused(client, "/v1/completions/render", body)
    limit = client.post("/v1/chat/completions/render", json={"messages": CHAT}).json()
    assert limit["sampling_params"]["max_tokens"] + len(limit["token_ids"]) == engine.longest_prompt + 1


@pytest.mark.parametrize(("levels", "taken"), [(200, True), (248, False)])
def test_what_is_read_can_be_written_some_levels_deeper(levels, taken):
    body = b"[" * levels + b"]" * levels

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    read = OrjsonRequest({"type": "http", "headers": []}, receive).json()
    if taken:
        assert len(asyncio.run(read)) == 1
    else:
        with pytest.raises(json.JSONDecodeError):
            asyncio.run(read)
