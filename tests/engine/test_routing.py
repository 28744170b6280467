"""Which experts each token went through: as a plain forward says, computed, cached, from the host or another node."""

import base64

import httpx
import jax.numpy as jnp
import numpy as np
import pytest
from apart import two_nodes
from conversations import tiered
from idle import check_idle
from test_host_tier import evict_all

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.errors import ConfigError, RequestError
from rootcellar.models.config import load_config
from rootcellar.models.decoder import embed, through_layers
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.kinds import EXPERTS, routed_layers
from rootcellar.models.loader import load_params
from serving import on_thread

SAMPLING = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True, "seed": 1}
OPTIONS = {"enable_return_routed_experts": True, "dtype": "float32", "max_running_requests": 4}
PROMPT = np.random.default_rng(3).integers(5, 500, 150).tolist()


def at_night(*names):
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.fixture(scope="module", params=["qwen3-moe", "llama4", *at_night("deepseek3", "gpt-oss", "qwen3-next")])
def folder(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp("models") / request.param, tokenizer=True)


@pytest.fixture(scope="module")
def engine(folder):
    with tiered(folder, hicache_ratio=4.0, **OPTIONS) as engine:
        yield engine
        check_idle(engine)


@pytest.fixture(scope="module")
def expected(folder):
    """What a forward pass without a cache chooses: int32 [tokens, layers, experts], 0 where there is no router."""
    cfg = load_config(folder)
    params = load_params(folder, cfg, jnp.float32)

    def of(ids):
        chosen = []
        hidden = embed(params, cfg, jnp.array(ids))
        through_layers(params, cfg, hidden, make_mix_dense(cfg, [len(ids)]), chosen.append)
        found = np.zeros((len(ids), cfg.num_layers, chosen[0].shape[1]), np.int32)
        found[:, routed_layers(cfg)] = np.stack(chosen, axis=1)
        return found

    return of


def read(result, like):
    """The experts in a result."""
    data = np.frombuffer(base64.b64decode(result["meta_info"]["routed_experts"]), "<i4")
    return data.reshape(-1, *like.shape[1:])


def ask(engine, prompt, **more):
    return engine.generate(input_ids=prompt, sampling_params=SAMPLING, return_routed_experts=True, **more)


def check(result, prompt, expected, start=0):
    ids = prompt + result["output_ids"]
    like = expected(ids)[start : len(ids) - 1]  # the last token of an answer goes through none
    np.testing.assert_array_equal(np.sort(read(result, like)), np.sort(like))  # their order is that of their weights


def test_they_are_those_of_a_plain_forward_wherever_the_prompt_was_cached(engine, expected, folder):
    cold = ask(engine, PROMPT)
    assert cold["meta_info"]["cached_tokens"] == 0
    check(cold, PROMPT, expected)
    hit = ask(engine, PROMPT, routed_experts_start_len=37)
    assert hit["meta_info"]["cached_tokens"] >= 64
    check(hit, PROMPT, expected, 37)
    evict_all(engine)
    longer = PROMPT + cold["output_ids"] + [7, 8, 9]
    loaded = ask(engine, longer)
    assert loaded["meta_info"]["cached_tokens_details"]["host"] >= 64
    check(loaded, longer, expected)
    assert EXPERTS in engine.stats()["cache"]
    assert "routed_experts" not in engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)["meta_info"]


def test_they_survive_retraction_and_end_with_what_was_computed(engine, expected):
    prompts = [[40 + i, *PROMPT[i:]] for i in range(4)]

    def pause(mode):
        engine.pause_generation(mode)
        engine.continue_generation()

    for mode in ("retract", "abort"):
        last, told = {}, False
        for result in ask(engine, prompts, stream=True):
            last[result["index"]] = result
            if not told and len(result["output_ids"]) > 3:
                told = True
                pause(mode)
        for i, prompt in enumerate(prompts):
            if mode == "retract":
                check(last[i], prompt, expected)
            elif "routed_experts" in last[i]["meta_info"]:
                ids = prompt + last[i]["output_ids"]
                like = expected(ids)
                found = read(last[i], like)
                assert len(prompt) < len(found) < len(ids)
                np.testing.assert_array_equal(np.sort(found), np.sort(like[: len(found)]))
        assert any("routed_experts" in result["meta_info"] for result in last.values())


def test_a_decode_node_has_those_that_the_prefill_node_computed(folder, expected):
    if folder.name == "qwen3-next":
        pytest.skip("states are not given to other nodes")
    with two_nodes(folder, **OPTIONS) as pair:
        before = pair.sent
        answer = pair.ask(PROMPT, 8, return_routed_experts=True)
        assert pair.sent > before
        check(answer, PROMPT, expected)


def test_over_http_and_refused_where_they_are_not_kept(engine, folder, expected):
    body = {"input_ids": PROMPT, "sampling_params": SAMPLING, "return_routed_experts": True}
    with on_thread(engine) as url:
        answer = httpx.post(url + "/generate", json={**body, "routed_experts_start_len": 100}, timeout=60)
        check(answer.json(), PROMPT, expected, 100)
    with rootcellar.Engine(model_path=folder, max_total_tokens=512) as other:
        with pytest.raises(RequestError, match="enable_return_routed_experts"):
            ask(other, PROMPT)
        with pytest.raises(RequestError, match="routed_experts_start_len"):
            ask(other, PROMPT, routed_experts_start_len=-1)


def test_a_model_without_experts_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="has no experts"):
        rootcellar.Engine(model_path=tiny_folder, enable_return_routed_experts=True)
