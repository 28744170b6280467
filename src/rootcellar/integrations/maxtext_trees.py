"""What the arrays of MaxText's models are called in Hugging Face's checkpoints. Needs no MaxText.

Llama (2, 3) and Qwen 3 without experts, as its checkpoint conversion has them (``param_mapping.py`` of 2025). Layers
are scanned, each array with those of all layers along its second axis (``param_scan_axis=1``), or apart (``layers_0``);
names are those of Flax's Linen (``params.decoder...``) or NNX (``base.decoder...``).

Llama's queries are stored divided by the root of a head's width, and the pairs that rotary embeddings turn lie beside
each other in its queries and keys: both is undone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from rootcellar.integrations.trees import Turning, leaves, linear, same

_WRAPPED = re.compile(r"(?:(?:params|base|model)\.)*(.+)")
_LAYER = re.compile(r"decoder\.layers(?:[_.](\d+))?\.(.+)")
_TOP: Mapping[str, tuple[str, Turning]] = {
    "token_embedder.embedding": ("model.embed_tokens.weight", same),
    "decoder.decoder_norm.scale": ("model.norm.weight", same),
    "decoder.logits_dense.kernel": ("lm_head.weight", linear(1)),
}
_QWEN3: Mapping[str, tuple[str, Turning]] = {
    "pre_self_attention_layer_norm.scale": ("input_layernorm", same),
    "post_self_attention_layer_norm.scale": ("post_attention_layernorm", same),
    "self_attention.query.kernel": ("self_attn.q_proj", linear(1)),
    "self_attention.key.kernel": ("self_attn.k_proj", linear(1)),
    "self_attention.value.kernel": ("self_attn.v_proj", linear(1)),
    "self_attention.out.kernel": ("self_attn.o_proj", linear(2)),
    "self_attention.query_norm.scale": ("self_attn.q_norm", same),
    "self_attention.key_norm.scale": ("self_attn.k_norm", same),
    "mlp.wi_0.kernel": ("mlp.gate_proj", linear(1)),
    "mlp.wi_1.kernel": ("mlp.up_proj", linear(1)),
    "mlp.wo.kernel": ("mlp.down_proj", linear(1)),
}


def _keys(array: Array) -> list[Array]:
    """A linear layer ``[E, heads, D]`` whose pairs are neighbours: halves again."""
    return linear(1)(jnp.concatenate([array[..., 0::2], array[..., 1::2]], axis=-1))


def _queries(array: Array) -> list[Array]:
    """The same, divided by the root of ``D``."""
    return _keys(array * jnp.sqrt(jnp.asarray(array.shape[-1], jnp.float32)).astype(array.dtype))


_LLAMA: Mapping[str, tuple[str, Turning]] = {
    **_QWEN3,
    "self_attention.query.kernel": ("self_attn.q_proj", _queries),
    "self_attention.key.kernel": ("self_attn.k_proj", _keys),
}


def llama_tensors_of(tree: Mapping[Any, Any]) -> dict[str, Array]:
    """A checkpoint's tensors of a Llama's params, nested mappings of arrays.

    For ``Engine.update_weights(tree, tensors_of=llama_tensors_of)``. What is not known keeps its own name, so that the
    engine says that it does not know it.
    """
    return _tensors(tree, _LLAMA)


def qwen3_tensors_of(tree: Mapping[Any, Any]) -> dict[str, Array]:
    """The same of a Qwen 3."""
    return _tensors(tree, _QWEN3)


def _tensors(tree: Mapping[Any, Any], of_layer: Mapping[str, tuple[str, Turning]]) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for whole, array in leaves(tree):
        wrapped = _WRAPPED.fullmatch(whole)
        assert wrapped is not None
        path = wrapped[1]
        layer = _LAYER.fullmatch(path)
        if path in _TOP:
            name, turn = _TOP[path]
            (tensors[name],) = turn(array)
        elif layer is not None and layer[2] in of_layer:
            name, turn = of_layer[layer[2]]
            scanned = range(array.shape[1]) if layer[1] is None else ()
            parts = {at: array[:, at] for at in scanned} or {int(layer[1] or 0): array}
            for at, part in parts.items():
                (tensors[f"model.layers.{at}.{name}.weight"],) = turn(part)
        else:
            tensors[whole] = array
    return tensors
