"""OpenAI's routes: what comes back, whole and streamed, and how what is wrong is refused."""

import json

import httpx
import pytest

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.server.openai.protocol import ChatRequest
from serving import on_thread
from vocabularies import write_sentencepiece

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
CHAT = [{"role": "user", "content": "What is a KV cache?"}]


def events(response):
    """The data of server-sent events; the last must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block[6:]) for block in blocks[:-1]]


def complete(client, **body):
    response = client.post("/v1/completions", json={**GREEDY, **body})
    assert response.status_code == 200, response.text
    return events(response) if body.get("stream") else response.json()


def chat(client, **body):
    response = client.post("/v1/chat/completions", json={"messages": CHAT, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return events(response) if body.get("stream") else response.json()


# -- completions ------------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_engine_says(client, engine):
    expected = engine.generate(
        prompt="What is a", sampling_params={"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    )
    answer = complete(client, prompt="What is a", model="demo")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": expected["text"], "logprobs": None, "finish_reason": "length", "matched_stop": None}
    ]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected["meta_info"]["prompt_tokens"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_every_form_of_prompt(client, engine):
    a, b = engine.encode("What is a"), engine.encode("The cache")
    one = [complete(client, prompt=prompt)["choices"] for prompt in ("What is a", a, ["What is a"], [a])]
    assert one[0] == one[1] == one[2] == one[3]
    two = [complete(client, prompt=prompt)["choices"] for prompt in (["What is a", "The cache"], [a, b])]
    assert two[0] == two[1]
    assert [choice["index"] for choice in two[0]] == [0, 1]
    assert two[0][0]["text"] == one[0][0]["text"]


def test_cached_tokens_are_always_told_and_by_tier(client, engine):
    prompt = "A prompt that is a few pages long, so that the second request finds it. " * 3
    first, second = (complete(client, prompt=prompt, cache_salt="told") for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 16
    assert second["sglext"]["cached_tokens_details"]["device"] == cached


@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_salts_isolate(client, name):
    prompt = f"{name}: nobody should see whether another tenant asked this before. " * 3
    cached = [
        complete(client, prompt=prompt, **({name: salt} if salt else {}))["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        for salt in (f"{name} a", f"{name} b", f"{name} a", "")
    ]
    assert cached[0] == cached[1] == cached[3] == 0
    assert cached[2] > 0


def test_a_salt_and_a_key_are_not_run_together(client):
    prompt = "The salt ab with the key c is another than the salt a with the key bc. " * 3
    pairs = [("ab", "c"), ("a", "bc"), ("ab", "c")]
    answers = [complete(client, prompt=prompt, cache_salt=salt, extra_key=key) for salt, key in pairs]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_echo_repeats_the_prompt_with_its_logprobs(client, engine):
    ids = engine.encode("What is a KV cache")
    expected = engine.generate(
        input_ids=ids,
        sampling_params={"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
    )
    for prompt in ("What is a KV cache", ids):
        (choice,) = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=3)["choices"]
        assert choice["text"] == "What is a KV cache" + expected["text"]
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert [choice["text"][at:].startswith(t) for at, t in zip(*_columns(logprobs), strict=True)]
        meta = expected["meta_info"]
        wanted = [value for value, *_ in meta["input_token_logprobs"] + meta["output_token_logprobs"]]
        assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
        assert logprobs["token_logprobs"][1:] == pytest.approx(wanted[1:], abs=1e-4)
        for token, value, top in list(zip(logprobs["tokens"], wanted, logprobs["top_logprobs"], strict=True))[1:]:
            assert 2 <= len(top) <= 3
            assert top[token] == pytest.approx(value, abs=1e-4)
        assert max(logprobs["top_logprobs"][-1].values()) == pytest.approx(wanted[-1], abs=1e-4)  # greedy


def _columns(logprobs):
    return logprobs["text_offset"], logprobs["tokens"]


def test_echo_alone_scores_a_prompt(client):
    (choice,) = complete(client, prompt="What is a", echo=True, logprobs=1, max_tokens=0)["choices"]
    assert choice["text"] == "What is a"
    assert len(choice["logprobs"]["tokens"]) == 3


def test_n_answers(client):
    answer = complete(client, prompt=["What", "The"], n=3, temperature=1, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len({choice["text"] for choice in answer["choices"][:3]}) == 3
    assert answer["usage"]["completion_tokens"] == 72
    assert answer["usage"]["prompt_tokens"] == 2
    assert complete(client, prompt=["What", "The"], n=3, temperature=1, seed=5)["choices"] == answer["choices"]


def _rounded(value):
    match value:
        case float():
            return pytest.approx(value, abs=1e-3)
        case list():
            return [_rounded(each) for each in value]
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
    return value


def test_a_stream_is_the_whole_answer_in_pieces(client):
    options = {"prompt": ["What is a", "The"], "n": 2, "temperature": 1, "seed": 3, "logprobs": 1, "echo": True}
    whole = complete(client, **options)
    pieces = complete(client, **options, stream=True, stream_options={"include_usage": True})
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"].items() >= {"completion_tokens": 48}.items()
    assert pieces[-1]["sglext"]["cached_tokens_details"].keys() == {"device", "host", "storage"}
    assert all("usage" not in piece for piece in pieces[:-1])
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces[:-1] if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + ["length"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [value for piece in mine if piece["logprobs"] for value in piece["logprobs"][name]]
            # Whatever computes a prompt in other steps rounds otherwise.
            assert joined == _rounded(choice["logprobs"][name])


def test_continuous_usage(client):
    pieces = complete(client, prompt="What", stream=True, stream_options={"continuous_usage_stats": True})
    used = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert used == sorted(used)
    assert used[-1] == 12


def test_stop_strings(client):
    answer = complete(client, prompt="What is a KV cache?", max_tokens=60)
    word = answer["choices"][0]["text"].split()[3]
    stopped = complete(client, prompt="What is a KV cache?", max_tokens=60, stop=[word])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["matched_stop"] == word
    assert word not in stopped["text"]
    pieces = complete(client, prompt="What is a KV cache?", max_tokens=60, stop=word, stream=True)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == stopped["text"]


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({}, "prompt", "prompt"),
        ({"prompt": 5}, "prompt", "prompt"),
        ({"prompt": ""}, "empty", None),
        ({"prompt": []}, "empty", None),
        ({"prompt": [[]]}, "empty", None),
        ({"prompt": ["a", 1]}, "must be a list of token ids", None),
        ({"prompt": [1, "a"]}, "no integer", None),
        ({"prompt": [[1], "a"]}, "must be a list of token ids", None),
        ({"prompt": [5000]}, "out of range", None),
        ({"prompt": [-1]}, "out of range", None),
        ({"prompt": [True]}, "no integer", None),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported", "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of", "best_of"),
        ({"prompt": "a", "logprobs": 50}, "logprobs", "logprobs"),
        ({"prompt": "a", "n": 9}, "max_n", "n"),
        ({"prompt": "a", "n": 0}, "n=0", "n"),
        ({"prompt": ["a"] * 17}, "max_batch_size", None),
        ({"prompt": "a", "max_tokens": 99999}, "context", None),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens=-1", "max_tokens"),
        ({"prompt": "a", "max_tokens": "16"}, "max_tokens", "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature", "temperature"),
        ({"prompt": "a", "top_p": 1.5}, "top_p", "top_p"),
        ({"prompt": "a", "seed": 2**63}, "seed", "seed"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "in [-100, 100]", "logit_bias"),
        ({"prompt": "word " * 5000}, "tokens", None),
    ],
)
def test_what_is_wrong_is_said(client, body, said, param):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_too_long_has_the_code_that_clients_look_for(client):
    response = client.post("/v1/completions", json={"prompt": [1] * 5000})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_another_model_is_not_found(client):
    response = client.post("/v1/completions", json={"prompt": "a", "model": "gpt-4"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/gpt-4").status_code == 404
    assert client.get("/v1/models/demo").json() == client.get("/v1/models").json()["data"][0]


# -- chat -------------------------------------------------------------------------------------------------------------


def test_a_chat_answers(client, engine):
    text = engine.chat_prompt(CHAT)
    expected = engine.generate(prompt=text, sampling_params={"temperature": 0, "max_new_tokens": 200})
    answer = chat(client)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected["text"], "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["object"] == "chat.completion"
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a KV cache?"}]}
    ]
    assert chat(client, messages=parts)["choices"] == answer["choices"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(client, name):
    answer = chat(client, **{name: 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_chat_stream(client):
    whole = chat(client, n=2, logprobs=True, top_logprobs=2, max_tokens=10)
    pieces = chat(
        client, n=2, logprobs=True, top_logprobs=2, max_tokens=10, stream=True, stream_options={"include_usage": True}
    )
    assert pieces[-1]["usage"]["completion_tokens"] == 20
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces[:-1] if p["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert all("role" not in piece["delta"] for piece in mine[1:])
        assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        joined = [entry for piece in mine if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        assert joined == choice["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == "length"


def test_chat_logprobs(client):
    content = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])  # greedy


def test_response_format(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    (choice,) = chat(client, response_format=form, max_tokens=50)["choices"]
    assert json.loads(choice["message"]["content"])["ok"] in (True, False)
    (choice,) = chat(client, response_format={"type": "json_object"}, max_tokens=20)["choices"]
    assert choice["message"]["content"].startswith("{")
    plain = chat(client, response_format={"type": "text"}, max_tokens=20)
    assert plain["choices"] == chat(client, max_tokens=20)["choices"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "knows no images"),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "needs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, "not understood"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "tokens"),
    ],
)
def test_what_is_wrong_with_a_chat_is_said(client, body, said):
    response = client.post("/v1/chat/completions", json={"messages": CHAT, **body})
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def test_a_schema_may_be_an_object_and_a_strict_one_is_closed_whatever_the_setting(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for given in (schema, json.dumps(schema)):
        assert json.loads(
            complete(client, prompt="x", json_schema=given, max_tokens=40)["choices"][0]["text"]
        ).keys() == {"ok"}
        sampling = {"json_schema": given, "max_new_tokens": 40}
        answer = client.post("/generate", json={"text": "x", "sampling_params": sampling}).json()
        assert json.loads(answer["text"]).keys() == {"ok"}
    for strict in (True, False):
        form = {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}
        body = ChatRequest.model_validate({"messages": CHAT, "response_format": form})
        asked = json.loads(body.arguments(9, None, {})["sampling_params"]["json_schema"])
        assert ("additionalProperties" in asked) is strict


def test_tokens_and_offsets_of_sentencepiece(tmp_path):
    """Each token has its own space, and the offsets are those in the text that is shown."""
    folder = make_checkpoint("llama2", tmp_path, vocab_size=288)
    write_sentencepiece(folder)
    with rootcellar.Engine(model_path=folder, max_total_tokens=256) as engine, on_thread(engine) as url:
        body = {"prompt": "hello world", "echo": True, "logprobs": 2, "max_tokens": 6, "temperature": 0, "n": 2}
        whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert len(whole) == 2
        for choice in whole:
            logprobs, text = choice["logprobs"], choice["text"]
            assert logprobs["tokens"][:7] == ["<s>", " hel", "lo", " w", "or", "l", "d"]
            assert logprobs["text_offset"][:7] == [0, 0, 3, 5, 7, 9, 10]
            assert text.startswith("hello world")
            ids = engine.encode("hello world")
            answer = engine.generate(input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 6})
            assert text == "hello world" + answer["text"]
            for token, at in zip(logprobs["tokens"][7:], logprobs["text_offset"][7:], strict=True):
                assert at <= len(text)
                assert text.startswith(token, at) or "\ufffd" in text[at:]  # bytes that make no character
        streamed = {**body, "n": 1, "stream": True}
        lines = httpx.post(f"{url}/v1/completions", json=streamed, timeout=60).text.split("\n\n")
        events = [json.loads(line[6:])["choices"][0]["logprobs"] for line in lines if line.startswith("data: {")]
        assert [at for each in events if each for at in each["text_offset"]] == whole[0]["logprobs"]["text_offset"]
        chat = {"prompt": [ids], "logprobs": 1, "max_tokens": 0, "echo": True}
        (sent,) = httpx.post(f"{url}/v1/completions", json=chat, timeout=60).json()["choices"]
        assert sent["text"] == "hello world"
        assert sent["logprobs"]["text_offset"] == [0, 0, 3, 5, 7, 9, 10]


def test_special_tokens_have_their_text_among_logprobs(client):
    body = {"prompt": "<|im_start|>user\nHi", "echo": True, "logprobs": 1, "max_tokens": 0}
    logprobs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "<|im_start|>"
    assert logprobs["text_offset"][:2] == [0, 12]
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    assert "".join(logprobs["tokens"]) == body["prompt"]
