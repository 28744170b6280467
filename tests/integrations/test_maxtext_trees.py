"""The names of MaxText's arrays, without MaxText: scanned layers or not, Linen's names or NNX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import make_checkpoint
from rootcellar.integrations.maxtext_trees import llama_tensors_of, qwen3_tensors_of
from rootcellar.models.config import load_config
from rootcellar.models.loader import load_params, tensors_from_params
from rootcellar.models.repacking import Repacking, params_of_tensors

HEADS = {"query": ("q", 4), "key": ("k", 2), "value": ("v", 2)}
FAMILIES = {"llama2": llama_tensors_of, "qwen3": qwen3_tensors_of}


def nested(flat):
    tree = {}
    for path, array in flat.items():
        *folders, name = path.split(".")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = array
    return tree


def layer_of(family, tensors, at):
    """One layer as MaxText's conversion from Hugging Face makes it (``param_mapping.py``)."""
    of = {name.split(f"layers.{at}.")[1]: t for name, t in tensors.items() if f"layers.{at}." in name}
    made = {
        "pre_self_attention_layer_norm.scale": of["input_layernorm.weight"],
        "post_self_attention_layer_norm.scale": of["post_attention_layernorm.weight"],
        "mlp.wi_0.kernel": of["mlp.gate_proj.weight"].T,
        "mlp.wi_1.kernel": of["mlp.up_proj.weight"].T,
        "mlp.wo.kernel": of["mlp.down_proj.weight"].T,
    }
    for name, (short, heads) in HEADS.items():
        kernel = of[f"self_attn.{short}_proj.weight"].T
        kernel = kernel.reshape(kernel.shape[0], heads, -1)
        if family == "llama2" and short in "qk":
            half = kernel.shape[-1] // 2
            kernel = np.stack([kernel[..., :half], kernel[..., half:]], axis=-1).reshape(kernel.shape)
        if family == "llama2" and short == "q":
            kernel = kernel / np.float32(np.sqrt(kernel.shape[-1]))
        made[f"self_attention.{name}.kernel"] = kernel
    made["self_attention.out.kernel"] = of["self_attn.o_proj.weight"].T.reshape(4, -1, made["mlp.wo.kernel"].shape[1])
    if family == "qwen3":
        made |= {
            f"self_attention.{name}_norm.scale": of[f"self_attn.{name[0]}_norm.weight"] for name in ("query", "key")
        }
    return made


def tree_of(family, tensors, layers, scanned, prefix):
    each = [layer_of(family, tensors, at) for at in range(layers)]
    if scanned:
        flat = {f"decoder.layers.{name}": np.stack([layer[name] for layer in each], axis=1) for name in each[0]}
    else:
        flat = {f"decoder.layers_{at}.{name}": array for at, layer in enumerate(each) for name, array in layer.items()}
    flat["token_embedder.embedding"] = tensors["model.embed_tokens.weight"]
    flat["decoder.decoder_norm.scale"] = tensors["model.norm.weight"]
    if "lm_head.weight" in tensors:
        flat["decoder.logits_dense.kernel"] = tensors["lm_head.weight"].T
    return nested({f"{prefix}{path}": jnp.asarray(array) for path, array in flat.items()})


@pytest.mark.parametrize(("scanned", "prefix"), [(True, "params."), (True, "base."), (False, "params.params.")])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_trained_tree_becomes_the_checkpoints_tensors_and_our_params(family, scanned, prefix, tmp_path):
    cfg = load_config(folder := make_checkpoint(family, tmp_path / family))
    params = load_params(folder, cfg, jnp.float32)
    tensors = {name: np.array(array) for name, array in tensors_from_params(cfg, params)}
    tree = tree_of(family, tensors, cfg.num_layers, scanned, prefix)
    found = FAMILIES[family](tree)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, err_msg=name)
    expected = params_of_tensors(cfg, found, jnp.float32)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    repack = Repacking(cfg, jnp.float32, FAMILIES[family], [place] * len(jax.tree.leaves(expected)))
    made = repack(tree)  # in one program, on the device
    with jax.transfer_guard("disallow_explicit"):
        again = repack(tree, [made.leaves[i] for i in made.made])
    for leaf, other in zip(again.leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6)


def test_what_is_not_known_keeps_its_name():
    """So that the engine, which refuses what the model has not, names it."""
    found = qwen3_tensors_of({"params": {"decoder": {"layers": {"mlp": {"wi": jnp.zeros((2, 2))}}}}})
    assert list(found) == ["params.decoder.layers.mlp.wi"]
