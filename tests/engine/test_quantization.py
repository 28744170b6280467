"""How weights are held: as bfloat16 under float32 arithmetic, and as integers of 8 and 4 bits."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from checkpoints import make_checkpoint
from rootcellar.errors import ConfigError
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params
from rootcellar.models.params import count_bytes, declare
from rootcellar.ops import products
from rootcellar.ops.panels import Packed, unpacked
from rootcellar.runner.placement import Placement
from rootcellar.runner.reserve import weight_bytes

PROMPT = list(range(5, 75))
SETTINGS = {"max_total_tokens": 512, "max_running_requests": 2, "chunked_prefill_size": 64, "skip_tokenizer_init": True}


@contextlib.contextmanager
def engine_of(folder, **settings):
    with rootcellar.Engine(model_path=folder, **SETTINGS, **settings) as engine:
        yield engine
        check_idle(engine)


def ask(engine):
    return engine.generate(
        input_ids=PROMPT,
        sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
    )


def logprobs(answer):
    return np.array([row[0] for row in answer["meta_info"]["input_token_logprobs"][1:]])


def held(engine):
    return sum(a.nbytes for a in jax.tree.leaves(engine._parts.runner.params))


@pytest.fixture(scope="module")
def expected(tiny_folder):
    with engine_of(tiny_folder) as engine:
        return ask(engine), held(engine), engine.prefixes.names(PROMPT)


def as_arrays(folder, holding):
    """The weights that a holding writes down, as arrays."""
    model = load_config(folder)
    weights = load_params(folder, model, jnp.float32)
    held = jax.tree.map(Placement(model, 1, holding).hold, declare(model), weights)
    return jax.tree.map(
        lambda w: unpacked(w) if isinstance(w, Packed) else w, held, is_leaf=lambda w: isinstance(w, Packed)
    )


@pytest.mark.parametrize(("holding", "share"), [("w8", 0.45), ("w4", 0.4)])
def test_integers_take_less_and_answer_as_the_weights_that_they_stand_for(tiny_folder, expected, holding, share):
    with engine_of(tiny_folder, params=as_arrays(tiny_folder, holding)) as engine:
        same = ask(engine)
    with engine_of(tiny_folder, quantization=holding) as engine:
        first = ask(engine)
        np.testing.assert_allclose(logprobs(first), logprobs(same), atol=2e-3)
        assert first["output_ids"] == same["output_ids"]
        placement, dtype = engine._parts.runner.placement, engine._parts.dtype
        assert held(engine) == weight_bytes(placement, dtype) == engine._parts.sizing.weights
        assert held(engine) < share * expected[1]
        assert not set(engine.prefixes.names(PROMPT)) & set(expected[2])
        compiled = engine.stats()["compilations"]
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        assert ask(engine)["output_ids"] == first["output_ids"]
        assert engine.stats()["compilations"] == compiled


def test_weights_that_are_handed_over_become_the_same_integers(tiny_folder):
    weights = load_params(tiny_folder, load_config(tiny_folder), jnp.float32)
    with (
        engine_of(tiny_folder, quantization="w8") as read,
        engine_of(tiny_folder, quantization="w8", params=weights) as given,
    ):
        assert ask(read)["output_ids"] == ask(given)["output_ids"]
        before = ask(given)["output_ids"]
        given.update_weights(jax.tree.map(lambda a: a * 1.5, weights))
        assert ask(given)["output_ids"] != before
        given.update_weights(weights)
        assert ask(given)["output_ids"] == before


@pytest.mark.skipif(not products.runs("cpu"), reason="no kernels here")
def test_bfloat16_is_kept_and_computed_with_in_float32(tmp_path):
    folder = make_checkpoint("qwen2", tmp_path / "half", dtype="bfloat16")
    with engine_of(folder, dtype="float32") as wide:
        answer, most = ask(wide), held(wide)
    with engine_of(folder) as engine:
        kept = ask(engine)
        assert kept["output_ids"] == answer["output_ids"]
        np.testing.assert_allclose(logprobs(kept), logprobs(answer), atol=1e-4)
        assert held(engine) < 0.55 * most
        assert engine._parts.dtype == jnp.float32


@pytest.mark.skipif(not products.runs("cpu"), reason="no kernels here")
def test_bfloat16_that_is_asked_for_is_kept_and_computed_with_in_float32(tiny_folder):
    """Tokens are those of float32 arithmetic over the same, rounded weights; names in a store tell them from others."""
    with engine_of(tiny_folder, params=as_arrays(tiny_folder, "bfloat16"), kv_cache_dtype="float32") as engine:
        answer = ask(engine)
    with engine_of(tiny_folder, dtype="bfloat16", kv_cache_dtype="float32") as engine:
        kept, names = ask(engine), engine.prefixes.names(PROMPT)
        assert engine._parts.dtype == jnp.float32
        assert held(engine) <= 0.57 * count_bytes(load_config(tiny_folder), jnp.float32)
    with engine_of(tiny_folder, kv_cache_dtype="float32") as engine:
        assert engine.prefixes.names(PROMPT)[0] != names[0]
    assert kept["output_ids"] == answer["output_ids"]
    np.testing.assert_allclose(logprobs(kept), logprobs(answer), atol=1e-4)


@pytest.mark.skipif(not products.runs("cpu"), reason="no kernels here")
def test_a_packed_weight_is_held_once_and_is_the_checkpoints(tmp_path):
    tiny_folder = make_checkpoint("qwen2", tmp_path / "half", dtype="bfloat16")
    model = load_config(tiny_folder)
    with engine_of(tiny_folder) as engine:
        params = engine._parts.runner.params
        assert held(engine) <= 0.57 * count_bytes(model, jnp.float32)
        weights = load_params(tiny_folder, model, jnp.float32)
        for ours, theirs in zip(params["layers"], weights["layers"], strict=True):
            assert isinstance(ours["qkv"], Packed)
            for name, array in theirs.items():
                whole = unpacked(ours[name]) if isinstance(ours[name], Packed) else ours[name]
                np.testing.assert_array_equal(whole, array)


def test_an_unknown_quantization_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="w8"):
        rootcellar.Engine(model_path=tiny_folder, quantization="int3")
