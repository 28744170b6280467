"""Parameters: one declaration, and what follows from it: random weights, checks, loading, saving."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import FAMILIES, make_checkpoint, make_config, make_tensors, tensor_shapes
from rootcellar.errors import ModelError
from rootcellar.models.config import load_config, read_config
from rootcellar.models.loader import check_weights, load_params, params_from_tensors, save_params, tensors_from_params
from rootcellar.models.packing import sources_of
from rootcellar.models.params import abstract_params, check_params, count_bytes, declare, init_params

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
BIASED = {"attention_bias": True, "mlp_bias": True}


def small(family="qwen2", **overrides):
    raw = make_config(family, **{**SMALL, **overrides})
    return raw, read_config(raw)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((f, {}) for f in FAMILIES), ("llama2", BIASED), ("qwen3", {"tie_word_embeddings": True})],
)
def test_the_declaration_names_every_tensor_of_the_checkpoint(family, overrides):
    raw = make_config(family, **overrides)
    specs = jax.tree.leaves(declare(read_config(raw)))
    declared = {each.name: each.shape for spec in specs for each in sources_of(spec)}
    assert declared == tensor_shapes(raw)
    assert all(len(spec.axes) == len(spec.shape) for spec in specs)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama2"])
def test_tensors_come_back_as_they_went_in(family):
    raw, cfg = small(family, **(BIASED if family == "llama2" else {}))
    tensors = make_tensors(raw, seed=1)
    back = dict(tensors_from_params(cfg, params_from_tensors(cfg, tensors, jnp.float32)))
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_packed_rows_are_grouped_by_key_value_head():
    raw, cfg = small(num_attention_heads=4, num_key_value_heads=2)
    tensors = make_tensors(raw, seed=1)
    layer = params_from_tensors(cfg, tensors, jnp.float32)["layers"][1]
    q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"].reshape(-1, 4, 16) for x in "qkv")
    for head in range(4):
        np.testing.assert_array_equal(layer["qkv"][:, head // 2, head % 2], q[head].T)
    for head in range(2):
        np.testing.assert_array_equal(layer["qkv"][:, head, 2], k[head].T)
        np.testing.assert_array_equal(layer["qkv"][:, head, 3], v[head].T)
    np.testing.assert_array_equal(layer["gate_up"][:, 1], tensors["model.layers.1.mlp.up_proj.weight"].T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_single_and_sharded_files_load_alike(tmp_path, dtype):
    one = make_checkpoint("qwen2", tmp_path / "one", dtype=dtype, **SMALL)
    three = make_checkpoint("qwen2", tmp_path / "three", dtype=dtype, shards=3, **SMALL)
    cfg = load_config(one)
    a, b = load_params(one, cfg, jnp.float32), load_params(three, cfg, jnp.float32)
    check_params(cfg, a)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    expected = make_tensors(make_config("qwen2", **SMALL), 0)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(a["embed"], jnp.asarray(expected, dtype).astype(jnp.float32))


def test_save_and_load(tmp_path):
    _, cfg = small(tie_word_embeddings=True)
    params = init_params(cfg, seed=4, dtype=jnp.bfloat16)
    save_params(tmp_path, cfg, params)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, cfg, jnp.bfloat16), params)


def test_random_params_fit_and_follow_the_seed():
    _, cfg = small("qwen3")
    params = init_params(cfg, seed=0, dtype=jnp.float32)
    check_params(cfg, params)
    assert sum(a.nbytes for a in jax.tree.leaves(params)) == count_bytes(cfg, jnp.float32)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(cfg, jnp.float32)) == shapes
    again, other = init_params(cfg, 0, jnp.float32), init_params(cfg, 1, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["layers"][0]["o"], other["layers"][0]["o"])
    assert not np.array_equal(params["layers"][0]["o"], params["layers"][1]["o"])
    assert 0.015 < float(params["embed"].std()) < 0.025


def test_params_that_do_not_fit_are_named():
    _, cfg = small()
    params = init_params(cfg, 0, jnp.float32)
    params["layers"][1].pop("o")
    params["layers"][0]["extra"] = jnp.zeros(1)
    params["norm"] = jnp.zeros(3)
    params["head"] = params["head"].astype(jnp.int32)
    with pytest.raises(ModelError) as error:
        check_params(cfg, params)
    for part in ("missing layers.1.o [4, 4, 16]", "unknown layers.0.extra", "norm has shape [3], not [16]"):
        assert part in str(error.value)
    assert "head is int32, not a float dtype" in str(error.value)


def test_too_few_layers_are_named_even_when_many():
    _, cfg = small(num_hidden_layers=6)
    params = init_params(cfg, 0, jnp.float32)
    with pytest.raises(ModelError, match=r"missing layers\.2\..*and \d+ more"):
        check_params(cfg, {**params, "layers": params["layers"][:2]})


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_weights_say_where_they_were_looked_for(tmp_path):
    make_checkpoint("qwen2", tmp_path, shards=2, **SMALL)
    cfg = load_config(tmp_path)
    name = "model.layers.1.self_attn.k_proj.bias"
    shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    other = next(p.name for p in tmp_path.glob("model-*") if p.name != shard)

    edit_index(tmp_path, lambda where: where.update({name: other}))
    with pytest.raises(ModelError, match=rf"{name}' should be in .*{other}"):
        load_params(tmp_path, cfg, jnp.float32)
    edit_index(tmp_path, lambda where: where.pop(name))
    with pytest.raises(ModelError, match=rf"{name}' \[8\] is missing from .*index.json"):
        load_params(tmp_path, cfg, jnp.float32)
    (tmp_path / shard).unlink()
    with pytest.raises(ModelError, match=f"{shard} is missing, which .*index.json names"):
        load_params(tmp_path, cfg, jnp.float32)
    (tmp_path / shard).write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match=f"{shard} is not a whole safetensors file"):
        load_params(tmp_path, cfg, jnp.float32)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="not an index with a weight_map"):
        load_params(tmp_path, cfg, jnp.float32)


def test_no_weights_at_all(tmp_path):
    _, cfg = small()
    with pytest.raises(ModelError, match="no model folder"):
        load_params(tmp_path / "nowhere", cfg, jnp.float32)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"looked for model\.safetensors, .*found pytorch_model\.bin"):
        load_params(tmp_path, cfg, jnp.float32)


def test_misshapen_and_unfit_tensors(tmp_path):
    make_checkpoint("llama2", tmp_path, **SMALL)
    wider = read_config(make_config("llama2", **{**SMALL, "intermediate_size": 28}))
    with pytest.raises(ModelError, match=r"down_proj.*has shape \[16, 24\], but config.json asks for \[16, 28\]"):
        load_params(tmp_path, wider, jnp.float32)
    with pytest.raises(ModelError, match=r"q_proj.bias' \[16\] is missing"):
        load_params(tmp_path, read_config(make_config("qwen2", **SMALL)), jnp.float32)
    whole = make_checkpoint("llama2", tmp_path / "int", dtype="int32", **SMALL)
    with pytest.raises(ModelError, match="I32; only BF16, F16"):
        load_params(whole, read_config(make_config("llama2", **SMALL)), jnp.float32)


def test_untied_head_that_is_missing_hints_at_tying(tmp_path):
    make_checkpoint("llama2", tmp_path, tie_word_embeddings=True, **SMALL)
    with pytest.raises(ModelError, match=r"lm_head.weight.*tie_word_embeddings"):
        load_params(tmp_path, read_config(make_config("llama2", **SMALL)), jnp.float32)


def test_unused_tensors_are_logged(tmp_path, caplog):
    make_checkpoint("qwen2", tmp_path, **SMALL)
    with caplog.at_level(logging.WARNING):
        load_params(tmp_path, read_config(make_config("llama2", **SMALL)), jnp.float32)
    assert "6 tensors" in caplog.text
    assert "model.layers.0.self_attn.k_proj.bias" in caplog.text


def test_tensors_in_memory_that_do_not_fit_are_named():
    raw, cfg = small()
    tensors = make_tensors(raw, 0)
    with pytest.raises(ModelError, match=r"model.norm.weight' has shape \[3\], not \[16\]"):
        params_from_tensors(cfg, {**tensors, "model.norm.weight": np.ones(3)}, jnp.float32)
    del tensors["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model.norm.weight' \[16\] is missing"):
        params_from_tensors(cfg, tensors, jnp.float32)


# --- a head that is tied by the config, and saved all the same --------------------------------------------------------


def saved_head(folder, change, **options):
    """A tied checkpoint with a head in the file: what ``change`` makes of the embeddings."""
    make_checkpoint("qwen2", folder, tie_word_embeddings=True, **SMALL, **options)
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = head = change(embed.copy())
    save_file(tensors, folder / "model.safetensors")
    return head


def changed_in_the_last_place(embed):
    embed[-1, -1] += 1
    return embed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_its_own_is_used_although_the_config_ties_it(tmp_path, caplog, dtype):
    head = saved_head(tmp_path, changed_in_the_last_place, dtype=dtype)
    with caplog.at_level(logging.WARNING):
        cfg = load_config(tmp_path)
    assert "has a head of its own" in caplog.text
    assert not cfg.tie_word_embeddings
    params = load_params(tmp_path, cfg, jnp.float32)
    np.testing.assert_array_equal(params["head"], head.T.astype(np.float32))
    assert not np.array_equal(params["head"], params["embed"].T)


def test_a_head_that_equals_the_embeddings_is_tied_and_takes_no_memory(tmp_path, caplog):
    saved_head(tmp_path, lambda embed: embed)
    with caplog.at_level(logging.WARNING):
        cfg = load_config(tmp_path)
        params = load_params(tmp_path, cfg, jnp.float32)
    assert cfg.tie_word_embeddings
    assert "head" not in params
    assert not caplog.records


def test_embeddings_that_only_the_head_holds(tmp_path):
    head = saved_head(tmp_path, lambda embed: embed)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    params = load_params(tmp_path, load_config(tmp_path), jnp.float32)
    np.testing.assert_array_equal(params["embed"], head)


def test_a_config_that_ties_what_the_file_does_not_is_no_config_for_it(tmp_path):
    saved_head(tmp_path, changed_in_the_last_place)
    tied = load_config(tmp_path, weights=False)
    assert tied.tie_word_embeddings
    with pytest.raises(ModelError, match=r"head of its own.*load_config"):
        load_params(tmp_path, tied, jnp.float32)
    check_weights(tmp_path, tied)


def test_a_head_of_another_shape_is_refused_by_name(tmp_path):
    saved_head(tmp_path, lambda embed: embed[:-1])
    with pytest.raises(ModelError, match=r"lm_head.weight.* has shape \[31, 16\]"):
        check_weights(tmp_path, load_config(tmp_path))
