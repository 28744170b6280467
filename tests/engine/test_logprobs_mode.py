"""Logprobs of what tokens are drawn from, as trainers compute them again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from rootcellar.models.config import load_config
from rootcellar.models.decoder import forward, logits
from rootcellar.models.dense import make_mix_dense
from rootcellar.models.loader import load_params

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def processed(tiny_folder):
    """An engine that says so."""
    with rootcellar.Engine(
        model_path=tiny_folder,
        logprobs_mode="processed_logprobs",
        max_total_tokens=512,
        max_running_requests=4,
        chunked_prefill_size=64,
    ) as engine:
        yield engine
        check_idle(engine)


def scores_of(folder, ids):
    """The model's scores, float64 [T, V], of the token after each of ``ids``, computed without a cache."""
    cfg = load_config(folder)
    mix = make_mix_dense(cfg, [len(ids)])
    compute = jax.jit(lambda params, ids: logits(params, cfg, forward(params, cfg, ids, mix)))
    return np.asarray(compute(load_params(folder, cfg, jnp.float32), jnp.asarray(ids)), np.float64)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.6, -1), (1.7, 20), (0, -1)])
def test_they_are_of_the_distribution_after_temperature_and_truncation(processed, tiny_folder, temperature, top_k):
    sampling = {"temperature": temperature, "top_k": top_k, "max_new_tokens": 16, "ignore_eos": True, "seed": 3}
    answer = processed.generate(
        input_ids=PROMPT, sampling_params=sampling, return_logprob=True, logprob_start_len=0, top_logprobs_num=3
    )
    ids, meta = answer["output_ids"], answer["meta_info"]
    scores = scores_of(tiny_folder, PROMPT + ids)
    expected = scores[len(PROMPT) - 1 : -1] / (temperature or 1)
    if top_k > 0:
        expected[expected < np.sort(expected, axis=-1)[:, -top_k, None]] = -np.inf
    expected = np.asarray(jax.nn.log_softmax(expected))
    said = [value for value, *_ in meta["output_token_logprobs"]]
    np.testing.assert_allclose(said, expected[np.arange(16), ids], atol=1e-4)
    best = np.array([[value for value, *_ in row] for row in meta["output_top_logprobs"]])
    np.testing.assert_allclose(best, -np.sort(-expected, axis=-1)[:, :3], atol=1e-4)
    at = np.asarray(jax.nn.log_softmax(scores / (temperature or 1)))[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    prompt = [value for value, *_ in meta["input_token_logprobs"]][1:]
    np.testing.assert_allclose(prompt, at, atol=1e-4)  # at the temperature, and not truncated: they were not drawn


def test_a_warm_up_compiles_all_of_it(processed):
    processed.warm_up()
    compiled = processed.stats()["compilations"]
    for sampling in ({"temperature": 0}, {"temperature": 0.7}, {"temperature": 1.0, "presence_penalty": 0.5}):
        processed.generate(
            input_ids=PROMPT, sampling_params={**sampling, "max_new_tokens": 2}, return_logprob=True, top_logprobs_num=2
        )
    assert processed.stats()["compilations"] == compiled
