"""Large answers: written in pieces, beside the event loop, each logprob once."""

import asyncio
import json
import threading

import httpx
import orjson
import pytest
from test_openai import events

from rootcellar.server.writing import PIECE, dumps, logprobs_of, written

PROMPT = [1 + i % 900 for i in range(700)]


@pytest.mark.parametrize("n", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 1000])
def test_pieces_make_the_same_json(n):
    rows = [(i / 7, i, None) for i in range(n)]
    content = {
        "a": rows,
        "choices": [{"logprobs": {"content": [{"token": "x", "top": rows[:3]} for _ in rows]}}],
        "b": n,
    }
    assert dumps(content) == orjson.dumps(content)
    assert dumps([content, content]) == orjson.dumps([content, content])


def test_much_is_written_on_a_thread_and_little_at_once():
    async def where(n):
        return await written(n, threading.get_ident)

    assert asyncio.run(where(5)) == threading.get_ident()
    assert asyncio.run(where(50_000)) != threading.get_ident()


def _body(**more):
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    return {
        "input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0,
        "top_logprobs_num": 5, **more,
    }  # fmt: skip


@pytest.mark.parametrize("texts", [False, True])
def test_a_stream_tells_the_prompts_logprobs_first_and_last_and_the_whole_answers(client, texts):
    whole = client.post("/generate", json=_body(return_text_in_logprobs=texts)).json()["meta_info"]
    assert logprobs_of([{"meta_info": whole}]) == (700 + 8) * 6
    sent = [
        each["meta_info"]
        for each in events(client.post("/generate", json=_body(stream=True, return_text_in_logprobs=texts)))
    ]
    for i, meta in enumerate(sent):
        assert ("input_top_logprobs" in meta) is (i in (0, len(sent) - 1))
        assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == meta["completion_tokens"]
        assert [each[1] for each in meta["output_token_logprobs"]] == [
            each[1] for each in whole["output_token_logprobs"][: meta["completion_tokens"]]
        ]
    for name in ("input_token_logprobs", "output_token_logprobs"):
        assert [each[1:] for each in sent[-1][name]] == [each[1:] for each in whole[name]]
    assert all((text is not None) is texts for _, _, text in sent[-1]["input_token_logprobs"])
    assert sent[0]["input_top_logprobs"] == sent[-1]["input_top_logprobs"]


def test_a_completions_echo_is_the_same_streamed_and_whole(client):
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "echo": True, "logprobs": 5}
    (whole,) = client.post("/v1/completions", json=body).json()["choices"]
    choices = [each["choices"][0] for each in events(client.post("/v1/completions", json={**body, "stream": True}))]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]


def test_the_servers_limit_on_the_likeliest(client):
    for path, body in [
        ("/generate", _body(top_logprobs_num=1024)),
        ("/generate", _body(top_logprobs_num=1024, return_logprob=False)),
    ]:
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert "max_logprobs" in answer.json()["error"]["message"]


def test_a_large_answer_lets_others_through(client, url):
    """What a large answer takes is not taken in one go: meanwhile others are answered."""
    answered = []
    done = threading.Event()

    def others():
        with httpx.Client(base_url=url, timeout=60) as other:
            while not done.is_set():
                answered.append(json.loads(other.get("/v1/models").content)["object"])

    thread = threading.Thread(target=others)
    thread.start()
    try:
        assert client.post("/generate", json=_body(top_logprobs_num=20)).status_code == 200
    finally:
        done.set()
        thread.join()
    assert len(answered) > 2
