"""Other people's clients, unmodified, against a real server process: openai, langchain-openai, litellm, lm_eval."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seeing import data_url, image_file, make_seeing
from serving import Server, wait_until

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore::UserWarning:pydantic")]
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its price list is not needed, and not fetched
openai = pytest.importorskip("openai")
langchain = pytest.importorskip("langchain_openai")
litellm = pytest.importorskip("litellm")

ROOT = Path(__file__).parents[2]
QUESTION = "What is a KV cache?"
ANSWER = "A KV cache keeps the attention keys and values of tokens that were already computed."
CHAT = [{"role": "user", "content": QUESTION}]
PLAIN = {"temperature": 0, "max_tokens": 16}
SCHEMA = {
    "title": "Verdict",
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "grade": {"type": "integer", "minimum": 1, "maximum": 6}},
    "required": ["good", "grade"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    with Server("--api-key", "secret") as server:
        yield server


@pytest.fixture
def base(server):
    """The address of OpenAI's routes; afterwards nothing runs."""
    yield f"{server.url}/v1"
    with server.client(headers={"Authorization": "Bearer secret"}) as client:
        wait_until(lambda: client.get("/v1/loads").json()["loads"][0]["num_total_reqs"] == 0)


@pytest.fixture
def client(base):
    with openai.OpenAI(base_url=base, api_key="secret", max_retries=0) as client:
        yield client


# ---- openai ----------------------------------------------------------------------------------------------------------


def test_openai_shows_a_picture_and_shows_it_again(tmp_path):
    picture = {"type": "image_url", "image_url": {"url": data_url(image_file()), "detail": "high"}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what is it"}]}]
    with (
        Server("--model-path", str(make_seeing(tmp_path)), max_total_tokens=1024) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        first, second = (client.chat.completions.create(model="default", messages=messages, **PLAIN) for _ in range(2))
        assert first.choices[0].message.content == second.choices[0].message.content
        assert second.usage.prompt_tokens_details.cached_tokens >= 16
        messages[0]["content"][0]["image_url"]["url"] = data_url(image_file()[:-30])
        with pytest.raises(openai.BadRequestError, match="a broken image"):
            client.chat.completions.create(model="default", messages=messages, **PLAIN)


def test_openai_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["demo"]


def test_openai_chat_is_the_same_streamed_and_whole(client):
    whole = client.chat.completions.create(model="demo", messages=CHAT, temperature=0, max_completion_tokens=16)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=CHAT,
            temperature=0,
            max_completion_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 16
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_openai_completions_of_text_and_of_token_ids(client):
    text = client.completions.create(model="demo", prompt=["A KV cache", "A page"], logprobs=2, **PLAIN)
    assert [choice.index for choice in text.choices] == [0, 1]
    assert text.choices[0].text.startswith(" keeps the attention keys")
    assert all(math.isfinite(value) for value in text.choices[0].logprobs.token_logprobs)
    chunks = client.completions.create(model="demo", prompt="A KV cache", stream=True, **PLAIN)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text
    ids = client.completions.create(model="demo", prompt=[5, 6, 7, 8], n=2, **PLAIN)
    assert ids.usage.prompt_tokens == 4
    assert ids.choices[0].text == ids.choices[1].text


def test_openai_usage_says_what_was_cached(client):
    chat = [{"role": "user", "content": "Remember this. " * 40 + QUESTION}]
    usages = [client.chat.completions.create(model="demo", messages=chat, **PLAIN).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached[0] == 0
    assert usages[1].prompt_tokens - 16 <= cached[1] < usages[1].prompt_tokens


def test_openai_logprobs_and_a_json_schema(client):
    answer = client.chat.completions.create(model="demo", messages=CHAT, logprobs=True, top_logprobs=3, **PLAIN)
    first = answer.choices[0].logprobs.content[0]
    assert first.logprob == max(option.logprob for option in first.top_logprobs)
    assert len(first.top_logprobs) == 3
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}
    told = client.chat.completions.create(
        model="demo", messages=CHAT, temperature=0, max_tokens=64, response_format=form
    )
    found = json.loads(told.choices[0].message.content)
    assert isinstance(found["good"], bool)
    assert 1 <= found["grade"] <= 6


def test_openai_errors_are_the_client_s_own(client, base):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=CHAT, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="demo", prompt="a", suffix="b")
    with (
        openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_openai_async_many_at_once_and_streams_left_midway(base):
    async def ask(client, leave: bool) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="demo", messages=CHAT, temperature=0, max_tokens=200 if leave else 16, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if leave and text:
                await stream.close()
                break
        return text

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base, api_key="secret", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, leave=i % 3 == 0) for i in range(12)))

    answers = asyncio.run(everybody())
    assert all(answer == ANSWER for i, answer in enumerate(answers) if i % 3)


# ---- langchain -------------------------------------------------------------------------------------------------------


def test_langchain_invokes_streams_and_batches(base):
    model = langchain.ChatOpenAI(base_url=base, api_key="secret", model="demo", max_retries=0, **PLAIN)
    answer = model.invoke(QUESTION)
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] == 16
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == ANSWER
    assert [one.content for one in model.batch([QUESTION, QUESTION])] == [ANSWER, ANSWER]
    completion = langchain.OpenAI(base_url=base, api_key="secret", model="demo", max_retries=0, **PLAIN)
    assert completion.invoke("A KV cache").startswith(" keeps the attention keys")


def test_langchain_structured_output(base):
    model = langchain.ChatOpenAI(base_url=base, api_key="secret", model="demo", temperature=0, max_tokens=64)
    found = model.with_structured_output(SCHEMA, method="json_schema").invoke(QUESTION)
    assert set(found) == {"good", "grade"}


# ---- litellm ---------------------------------------------------------------------------------------------------------


def test_litellm_completes_streams_and_counts(base):
    common = {"api_base": base, "api_key": "secret", **PLAIN}
    whole = litellm.completion(model="openai/demo", messages=CHAT, **common)
    assert whole.choices[0].message.content == ANSWER
    assert whole.usage.completion_tokens == 16
    chunks = litellm.completion(model="openai/demo", messages=CHAT, stream=True, **common)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    text = litellm.text_completion(model="text-completion-openai/demo", prompt="A KV cache", **common)
    assert text.choices[0].text.startswith(" keeps the attention keys")


# ---- lm_eval ---------------------------------------------------------------------------------------------------------


def evaluate(url: str, folder: Path) -> tuple[float, list]:
    """The score of the multiple-choice task in lm_eval/, and each sample's log-likelihoods, one request at a time."""
    model = (
        f"model=demo,base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer=src/rootcellar/demo/model"
    )
    words = ["run", "--model", "local-completions", "--model_args", model, "--tasks", "cache_facts"]
    words += ["--include_path", "tests/server/lm_eval", "--log_samples", "--output_path", str(folder)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lm_eval")), *words],
        cwd=ROOT,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_*.jsonl")
    score = json.loads(results.read_text())["results"]["cache_facts"]["acc,none"]
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return score, [line["resps"] for line in lines]


def test_lm_eval_scores_the_same_with_the_prefix_cache_on_and_off(tmp_path):
    with Server() as server:
        score, with_cache = evaluate(server.url, tmp_path / "on")
    with Server("--disable-radix-cache") as server:
        plain_score, without = evaluate(server.url, tmp_path / "off")
    assert len(with_cache) == 24
    assert score == plain_score >= 0.9  # chance is 0.25
    assert with_cache == without
