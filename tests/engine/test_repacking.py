"""Weights of a trainer's unfused trees, made ours on the device: the same answers, nothing compiled or copied twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idle import check_idle

import rootcellar
from alive import alive
from checkpoints import FAMILIES, make_checkpoint
from rootcellar.errors import EngineError, ModelError
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params, tensors_from_params
from rootcellar.models.repacking import params_of_tensors

PROMPT = list(range(5, 75))
SAMPLING = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
FUSED = {"head", "qkv", "qkv_bias", "o", "gate_up", "down"}


@pytest.fixture(scope="module")
def cfg(tiny_folder):
    return load_config(tiny_folder)


@pytest.fixture(scope="module")
def weights(tiny_folder, cfg):
    return load_params(tiny_folder, cfg, jnp.float32)


@pytest.fixture(scope="module")
def tensors(cfg, weights):
    return {name: jnp.asarray(array) for name, array in tensors_from_params(cfg, weights)}


@pytest.fixture(scope="module")
def given(tiny_folder, weights):
    with rootcellar.Engine(
        model_path=tiny_folder,
        params=weights,
        max_total_tokens=1024,
        max_running_requests=4,
        chunked_prefill_size=64,
    ) as engine:
        yield engine
        check_idle(engine)


def ask(engine):
    return engine.generate(input_ids=PROMPT, sampling_params=SAMPLING)["output_ids"]


def scaled(tensors, factor):
    return {name: array * factor for name, array in tensors.items()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_familys_tensors_become_its_params(family, tmp_path):
    cfg = load_config(folder := make_checkpoint(family, tmp_path / family))
    params = load_params(folder, cfg, jnp.float32)
    tensors = dict(tensors_from_params(cfg, params))
    made = params_of_tensors(cfg, tensors, jnp.float32)
    assert jax.tree.structure(made) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(params), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_only_what_was_fused_is_copied_and_the_rest_is_the_trainers(given, tensors, weights):
    expected = ask(given)
    copied = given.update_weights_from_tensor(tensors)["copied"]
    assert {name.rpartition(".")[2] for name in copied} == FUSED
    params = given._parts.runner.params
    for ours, theirs in (
        (params["embed"], tensors["model.embed_tokens.weight"]),
        (params["layers"][1]["attn_norm"], tensors["model.layers.1.input_layernorm.weight"]),
    ):
        assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    assert ask(given) == expected
    given.update_weights(weights)


def test_after_the_first_nothing_compiles_and_no_memory_is_taken(given, tensors, weights):
    expected = ask(given)
    given.update_weights_from_tensor(tensors)
    ask(given)
    other = scaled(tensors, 1.5)
    jax.block_until_ready(other)
    compiled = given.stats()["compilations"]
    before = sum(array.nbytes for array in alive())
    places = pointers(given)
    for theirs in (other, tensors, other):
        given.update_weights_from_tensor(theirs)
        ask(given)
        given.check()
        assert pointers(given) == places  # written over what was made before
    assert sum(array.nbytes for array in alive()) == before
    assert given.stats()["compilations"] == compiled
    assert ask(given) != expected
    given.update_weights_from_tensor(tensors)
    assert ask(given) == expected
    given.update_weights(weights)


def pointers(engine):
    """Where what was made lies."""
    layers = engine._parts.runner.params["layers"]
    return [layer[name].unsafe_buffer_pointer() for layer in layers for name in ("qkv", "gate_up")]


def test_nothing_goes_through_the_host(given, tensors, weights, cfg):
    """A trainer forbids it: what moves between host and device without a word is an error."""
    given.update_weights_from_tensor(tensors)  # compiled, constants placed
    repacking = given._parts.runner.placement.repacking(jnp.float32, lambda tree: tree)
    repacking(tensors)
    with jax.transfer_guard("disallow_explicit"):
        leaves, made = repacking(tensors)
    expected = jax.tree.leaves(weights)
    assert all(np.array_equal(one, other) for one, other in zip(leaves, expected, strict=True))
    assert 0 < len(made) < len(leaves)
    given.update_weights(weights)


def test_what_was_made_is_given_back_with_the_weights_and_what_was_lent_is_not(given, tensors, weights):
    given.update_weights_from_tensor(tensors)
    made = [layer["qkv"] for layer in given._parts.runner.params["layers"]]
    report = given.release_memory_occupation("weights")
    assert all(array.is_deleted() for array in made)
    assert report["buffers"] == 1 + len(made) * 5  # the head; of each layer, without its norms
    assert not tensors["model.embed_tokens.weight"].is_deleted()
    with pytest.raises(EngineError, match="update_weights"):
        given.resume_memory_occupation()
    given.update_weights_from_tensor(tensors)
    given.resume_memory_occupation()
    ask(given)
    given.update_weights(weights)


def test_tensors_that_are_not_the_models_are_named_and_nothing_changes(given, tensors):
    expected = ask(given)
    wrong = {**tensors, "model.extra": tensors["model.norm.weight"]}
    del wrong["model.layers.0.mlp.up_proj.weight"]
    wrong["model.norm.weight"] = wrong["model.norm.weight"][:-1]
    wrong["model.layers.1.self_attn.q_proj.bias"] = jnp.zeros(256, jnp.int32)
    with pytest.raises(ModelError) as found:
        given.update_weights_from_tensor(wrong)
    for part in ("missing model.layers.0.mlp.up_proj", "unknown model.extra", "has shape [255]", "is int32"):
        assert part in str(found.value)
    assert ask(given) == expected


def test_an_engine_that_packs_its_weights_packs_these(tiny_folder, tensors):
    with rootcellar.Engine(
        model_path=tiny_folder,
        quantization="w8",
        max_total_tokens=256,
        max_running_requests=1,
        chunked_prefill_size=64,
    ) as engine:
        expected = ask(engine)
        copied = engine.update_weights_from_tensor(tensors)["copied"]
        assert ask(engine) == expected
        assert "norm" not in copied
        assert "embed" in copied
