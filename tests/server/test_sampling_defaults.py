"""Whose defaults a request is sampled with, and which values are taken."""

import json
import shutil

import httpx
import pytest

import rootcellar
from rootcellar.demo import load_facts
from rootcellar.errors import ModelError
from rootcellar.server.app import create_app
from rootcellar.server_config import ServerConfig
from serving import on_thread

LENGTH = 12


@pytest.fixture(scope="module")
def recommending(tiny_folder, tmp_path_factory):
    """An engine whose model recommends to take the likeliest token."""
    folder = tmp_path_factory.mktemp("models") / "recommending"
    shutil.copytree(tiny_folder, folder)
    recommended = {"top_k": 1, "top_p": None, "repetition_penalty": 1.0, "do_sample": True, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    with rootcellar.Engine(
        model_path=folder, max_total_tokens=512, max_running_requests=2, chunked_prefill_size=16
    ) as engine:
        yield engine


def _texts(url, **more):
    """The answers of both of OpenAI's routes for completions and of /generate to one prompt, seeded."""
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {"prompt": [5, 6, 7], "max_tokens": LENGTH, "seed": 11, "ignore_eos": True, **more}
        completion = client.post("/v1/completions", json=body)
        params = {"max_new_tokens": LENGTH, "seed": 11, "ignore_eos": True}
        native = client.post("/generate", json={"input_ids": [5, 6, 7], "sampling_params": params})
        return completion.json()["choices"][0]["text"], native.json()["text"]


def test_the_models_recommendation_is_the_default_of_openais_routes(recommending):
    def asked(**params):
        params = {"max_new_tokens": LENGTH, "seed": 11, "ignore_eos": True, **params}
        return recommending.generate(input_ids=[5, 6, 7], sampling_params=params)["text"]

    greedy, drawn = asked(temperature=0), asked()
    assert greedy != drawn
    with on_thread(recommending) as url:
        assert _texts(url) == (greedy, drawn)
        assert _texts(url, top_k=None) == (greedy, drawn)
        assert _texts(url, top_k=-1) == (drawn, drawn)
    with on_thread(recommending, sampling_defaults="openai") as url:
        assert _texts(url) == (drawn, drawn)


def test_the_embedded_models_recommendation_is_one_that_it_can_bear(url):
    """At temperature 1 it rambles; who asks it without saying how gets what it was taught."""

    def answer(seed, **more):
        body = {"messages": [{"role": "user", "content": "What does page_size do?"}], "seed": seed, **more}
        reply = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 100}, timeout=60)
        return reply.json()["choices"][0]["message"]["content"]

    taught = next(fact for fact in load_facts() if fact.id == "page_size").answer
    assert [answer(seed) for seed in range(8)] == [taught] * 8
    assert any(answer(seed, temperature=1) != taught for seed in range(8))


def test_a_recommendation_that_is_not_allowed_is_named(recommending, tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": -1}')
    wrong = recommending.config.__class__(model_path=str(tmp_path))
    before, recommending.config = recommending.config, wrong
    try:
        with pytest.raises(ModelError, match=r"generation_config\.json: temperature=-1 is not allowed"):
            create_app(recommending, ServerConfig())
        create_app(recommending, ServerConfig(sampling_defaults="openai"))
    finally:
        recommending.config = before


@pytest.mark.parametrize("seed", [2**40, -1, 2**63 - 1, -(2**63), 0])
def test_seeds_have_64_bits(client, seed):
    body = {"prompt": "What", "seed": seed, "max_tokens": 8, "ignore_eos": True, "temperature": 1}
    first, again = (client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(2))
    assert first == again
    low = client.post("/v1/completions", json={**body, "seed": seed % 2**32}).json()["choices"][0]["text"]
    assert (low == first) is (0 <= seed < 2**32)


@pytest.mark.parametrize(
    "params", [{"top_p": 0}, {"top_k": 0, "temperature": 0}, {"min_p": 0, "temperature": 0}, {"top_k": 1}]
)
def test_zeros_are_taken(client, params):
    body = {"prompt": "What", "max_tokens": 8, "ignore_eos": True}
    greedy = client.post("/v1/completions", json={**body, "temperature": 0}).json()["choices"][0]["text"]
    assert client.post("/v1/completions", json={**body, **params}).json()["choices"][0]["text"] == greedy


def test_none_is_the_default(client, engine):
    params = {
        "max_new_tokens": 8,
        "temperature": 0,
        "top_p": None,
        "stop": None,
        "seed": None,
        "n": None,
        "min_p": None,
    }
    offline = engine.generate(prompt="What", sampling_params=params)
    assert client.post("/generate", json={"text": "What", "sampling_params": params}).json()["text"] == offline["text"]
    assert len(engine.generate(prompt="What", sampling_params={"max_new_tokens": None})["output_ids"]) <= 128
