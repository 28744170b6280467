"""Loops of tools by other people's libraries, unmodified, over a real socket: openai, anthropic, LangChain, llm.

The embedded model has never seen a tool. Where a client leaves it to the model whether one is called, a script decides:
a call is required until a result is there. All else is the server as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import rootcellar
from rootcellar.server.openai import chat
from serving import idle, on_thread

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore::UserWarning:pydantic")]
openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
langchain = pytest.importorskip("langchain_openai")

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
QUESTION = "What is the weather?"
WEATHER = {"Paris": "rain", "Rome": "sun"}


@pytest.fixture(scope="module")
def engine():
    with rootcellar.Engine(model_path="demo", max_total_tokens=4096, max_queued_requests=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with on_thread(engine, api_key="secret", response_pin=0) as url:
        yield url
    idle(engine)


@pytest.fixture
def scripted(monkeypatch):
    """A call is required until there is a result."""
    read = chat.chat_listening

    def decide(state, body, prompts):
        if body.tools and body.messages[-1]["role"] != "tool":
            body = body.model_copy(update={"tool_choice": "required", "parallel_tool_calls": False})
        return read(state, body, prompts)

    monkeypatch.setattr(chat, "chat_listening", decide)


def test_openai_s_loop_of_tools(url):
    tools = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}]
    messages, cached = [{"role": "user", "content": QUESTION}], []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        for _ in range(3):
            answer = client.chat.completions.create(
                model="demo", messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False,
                temperature=0, max_tokens=100,
            )  # fmt: skip
            (choice,) = answer.choices
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            city = json.loads(call.function.arguments)["city"]
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
            messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER[city]}]
    assert cached[0] < cached[1] < cached[2]


def test_openai_s_own_accumulation_of_a_stream(url):
    tools = [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}]
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client,
        client.chat.completions.stream(
            model="demo", messages=[{"role": "user", "content": QUESTION}], tools=tools, tool_choice="required",
            parallel_tool_calls=False, temperature=0, max_tokens=100,
        ) as stream,
    ):  # fmt: skip
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 2
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments["city"] in WEATHER


def test_openai_s_responses_go_on_from_one_another(url):
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
    options = {
        "model": "demo",
        "tools": tools,
        "temperature": 0,
        "max_output_tokens": 100,
        "parallel_tool_calls": False,
    }
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        first = client.responses.create(input=QUESTION, tool_choice="required", **options)
        (call,) = first.output
        result = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": WEATHER[json.loads(call.arguments)["city"]],
        }
        with client.responses.stream(
            input=[result], previous_response_id=first.id, tool_choice="required", **options
        ) as stream:
            kinds = [event.type for event in stream]
            second = stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        assert second.output[0].type == "function_call"
        assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens_details.cached_tokens
        assert client.responses.retrieve(first.id).id == first.id
        plain = client.responses.create(model="demo", input="What is a KV cache?", temperature=0, max_output_tokens=16)
        assert plain.output_text.startswith("A KV cache keeps")
        with pytest.raises(openai.BadRequestError, match="not found"):
            client.responses.create(model="demo", input="x", previous_response_id="resp_none")


def test_anthropic_s_loop_of_tools_streamed_with_its_usage(url):
    tools = [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}]
    system = [{"type": "text", "text": "You tell the weather. " * 10, "cache_control": {"type": "ephemeral"}}]
    messages, cached = [{"role": "user", "content": QUESTION}], []
    options = {"model": "demo", "max_tokens": 100, "tools": tools, "system": system, "extra_body": {"temperature": 0}}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
        for _ in range(3):
            with client.messages.stream(messages=messages, tool_choice=choice, **options) as stream:
                kinds = [event.type for event in stream]
                answer = stream.get_final_message()
            assert "input_json" in kinds
            assert answer.stop_reason == "tool_use"
            (call,) = answer.content
            cached.append(answer.usage)
            result = {"type": "tool_result", "tool_use_id": call.id, "content": WEATHER[call.input["city"]]}
            messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        count = client.messages.count_tokens(model="demo", messages=messages, tools=tools, system=system)
        assert count.input_tokens > cached[2].cache_read_input_tokens
        assert cached[0].cache_creation_input_tokens > 50
        reads = [usage.cache_read_input_tokens for usage in cached]
        assert reads[0] < reads[1] < reads[2]
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            client.messages.create(model="demo", max_tokens=5, messages=messages[:1], extra_body={"temperature": -1})
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="claude-x", max_tokens=5, messages=messages[:1])
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model="demo", max_tokens=5, messages=messages[:1])
    httpx.post(f"{url}/flush_cache?timeout=5", headers={"Authorization": "Bearer secret"}).raise_for_status()


def test_langchain_binds_tools(url, scripted):
    model = langchain.ChatOpenAI(
        base_url=f"{url}/v1", api_key="secret", model="demo", temperature=0, max_tokens=100, max_retries=0
    )
    bound = model.bind_tools([{"name": "weather", "description": "The weather.", "parameters": SCHEMA}])
    messages = [("user", QUESTION)]
    answer = bound.invoke(messages)
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    total = None
    for chunk in bound.stream(messages):
        total = chunk if total is None else total + chunk
    assert [each["args"] for each in total.tool_calls] == [call["args"]]
    messages += [answer, {"role": "tool", "tool_call_id": call["id"], "content": WEATHER[call["args"]["city"]]}]
    last = bound.invoke(messages)
    assert last.content
    assert last.usage_metadata["input_token_details"]["cache_read"] > 16


def test_llm_calls_a_tool_and_hears_its_result(url, scripted, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: demo\n  model_name: demo\n  api_base: {url}/v1\n  api_key_name: rootcellar\n"
        "  supports_tools: true\n  can_stream: true\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"rootcellar": "secret"}))
    functions = (
        "import typing\n"
        'def weather(city: typing.Literal["Paris", "Rome"]) -> str:\n'
        '    "The weather."\n    return "It is sunny in " + city\n'
    )
    words = ["-m", "demo", "--functions", functions, "--td", "-o", "max_tokens", "100", QUESTION]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("llm")), *words],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "It is sunny in" in done.stderr
    assert done.stdout.strip()
