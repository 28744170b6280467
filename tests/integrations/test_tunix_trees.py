"""The names of Tunix's arrays, without Tunix: a model's tree in its form becomes the checkpoint's tensors again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import make_checkpoint
from rootcellar.errors import ModelError
from rootcellar.integrations.tunix_trees import tensors_of
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params, tensors_from_params
from rootcellar.models.repacking import params_of_tensors

HEADS = {"q": 4, "k": 2, "v": 2}


def tree_of(family, tensors, layers):
    """The tree that Tunix's loader makes of a checkpoint's tensors."""
    width = tensors["model.layers.0.self_attn.q_proj.weight"].shape[0] // HEADS["q"]

    def heads(name, at):
        weight = tensors[f"model.layers.{at}.self_attn.{name}_proj.weight"]
        return weight.T.reshape(weight.shape[1], HEADS[name], width)

    def layer(at):
        of = {name.split(f"layers.{at}.")[1]: t for name, t in tensors.items() if f"layers.{at}." in name}
        out = of["self_attn.o_proj.weight"].T.reshape(HEADS["q"], width, -1)
        mlp = {f"{name}_proj": {"kernel": of[f"mlp.{name}_proj.weight"].T} for name in ("gate", "up", "down")}
        if family == "gemma3":
            by_head = {name: heads(name, at).transpose(1, 0, 2) for name in "qkv"}
            return {
                "attn": {
                    "q_einsum": {"w": by_head["q"]},
                    "kv_einsum": {"w": np.stack([by_head["k"], by_head["v"]])},
                    "attn_vec_einsum": {"w": out},
                    "_query_norm": {"scale": of["self_attn.q_norm.weight"]},
                    "_key_norm": {"scale": of["self_attn.k_norm.weight"]},
                },
                "mlp": mlp,
                "pre_attention_norm": {"scale": of["input_layernorm.weight"]},
                "post_attention_norm": {"scale": of["post_attention_layernorm.weight"]},
                "pre_ffw_norm": {"scale": of["pre_feedforward_layernorm.weight"]},
                "post_ffw_norm": {"scale": of["post_feedforward_layernorm.weight"]},
            }
        attention = {f"{name}_proj": {"w": heads(name, at)} for name in "qkv"} | {"o_proj": {"w": out}}
        if family == "qwen2":
            attention |= {f"{name}_bias": of[f"self_attn.{name}_proj.bias"] for name in "qkv"}
        if family == "qwen3":
            attention |= {f"{name}_norm": {"w": of[f"self_attn.{name}_norm.weight"]} for name in "qk"}
        norms = {name: {"w": of[f"{name}.weight"]} for name in ("input_layernorm", "post_attention_layernorm")}
        return {"attn": attention, "mlp": mlp, **norms}

    return {
        "embedder": {"input_embedding": tensors["model.embed_tokens.weight"]},
        "layers": {at: layer(at) for at in range(layers)},
        "final_norm": {"scale" if family == "gemma3" else "w": tensors["model.norm.weight"]},
        **({"lm_head": {"w": tensors["lm_head.weight"].T}} if "lm_head.weight" in tensors else {}),
    }


@pytest.mark.parametrize("family", ["llama2", "qwen2", "qwen3", "gemma3"])
def test_a_tree_of_tunix_becomes_ours(family, tmp_path):
    cfg = load_config(folder := make_checkpoint(family, tmp_path / family))
    params = load_params(folder, cfg, jnp.float32)
    tree = tree_of(family, dict(tensors_from_params(cfg, params)), len(cfg.layers))
    made = params_of_tensors(cfg, tensors_of(jax.tree.map(jnp.asarray, tree)), jnp.float32)
    assert jax.tree.structure(made) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_no_rule_knows_is_named(tiny_folder):
    cfg = load_config(tiny_folder)
    tensors = dict(tensors_from_params(cfg, load_params(tiny_folder, cfg, jnp.float32)))
    tree = tree_of("qwen2", tensors, len(cfg.layers))
    tree["layers"][0]["adapter"] = {"w": np.zeros(3, np.float32)}
    with pytest.raises(ModelError, match=r"unknown layers\.0\.adapter\.w"):
        params_of_tensors(cfg, tensors_of(tree), jnp.float32)
