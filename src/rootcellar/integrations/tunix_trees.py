"""What the arrays of Tunix's models are called in Hugging Face's checkpoints. Needs no Tunix.

Llama 3, Qwen 2, Qwen 3 (without experts) and Gemma 3 (text), as 0.1.7 has them. Arrays are turned as they are in a
checkpoint, inputs last; compiled with what takes them apart again, the turn is no copy of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jax import Array

from rootcellar.integrations.trees import Turning, leaves, linear, same


def _by_head(array: Array) -> list[Array]:
    """One linear layer ``[N, D, H]``: heads, inputs, width."""
    heads, inputs, width = array.shape
    return [array.transpose(0, 2, 1).reshape(heads * width, inputs)]


def _several(array: Array) -> list[Array]:
    return [tensor for part in array for tensor in _by_head(part)]


_LAYER, _HF = r"layers\.(\d+)\.", r"model.layers.\1."
_RULES: tuple[tuple[str, tuple[str, ...], Turning], ...] = (
    (r"embedder\.input_embedding", ("model.embed_tokens.weight",), same),
    (r"final_norm\.(?:w|scale)", ("model.norm.weight",), same),
    (r"lm_head\.w", ("lm_head.weight",), linear(1)),
    (_LAYER + r"attn\.([qkv])_proj\.w", (_HF + r"self_attn.\2_proj.weight",), linear(1)),
    (_LAYER + r"attn\.([qkv])_bias", (_HF + r"self_attn.\2_proj.bias",), same),
    (_LAYER + r"attn\.([qk])_norm\.w", (_HF + r"self_attn.\2_norm.weight",), same),
    (_LAYER + r"attn\.(?:o_proj|attn_vec_einsum)\.w", (_HF + "self_attn.o_proj.weight",), linear(2)),
    (_LAYER + r"mlp\.(gate|up|down)_proj\.kernel", (_HF + r"mlp.\2_proj.weight",), linear(1)),
    (_LAYER + r"(input|post_attention)_layernorm\.w", (_HF + r"\2_layernorm.weight",), same),
    # Gemma 3
    (_LAYER + r"attn\.q_einsum\.w", (_HF + "self_attn.q_proj.weight",), _by_head),
    (_LAYER + r"attn\.kv_einsum\.w", tuple(f"{_HF}self_attn.{p}_proj.weight" for p in "kv"), _several),
    (_LAYER + r"attn\.qkv_einsum\.w", tuple(f"{_HF}self_attn.{p}_proj.weight" for p in "qkv"), _several),
    (_LAYER + r"attn\._query_norm\.scale", (_HF + "self_attn.q_norm.weight",), same),
    (_LAYER + r"attn\._key_norm\.scale", (_HF + "self_attn.k_norm.weight",), same),
    (_LAYER + r"pre_attention_norm\.scale", (_HF + "input_layernorm.weight",), same),
    (_LAYER + r"post_attention_norm\.scale", (_HF + "post_attention_layernorm.weight",), same),
    (_LAYER + r"pre_ffw_norm\.scale", (_HF + "pre_feedforward_layernorm.weight",), same),
    (_LAYER + r"post_ffw_norm\.scale", (_HF + "post_feedforward_layernorm.weight",), same),
)


def tensors_of(tree: Mapping[Any, Any]) -> dict[str, Array]:
    """A checkpoint's tensors of a model's params, as ``nnx.to_pure_dict`` gives them.

    For ``Engine.update_weights(tree, tensors_of=tensors_of)``. What no rule knows keeps its own name, so that the
    engine says that it does not know it.
    """
    tensors: dict[str, Array] = {}
    for path, array in leaves(tree):
        for pattern, names, turn in _RULES:
            found = re.fullmatch(pattern, path)
            if found is not None:
                tensors |= zip((found.expand(name) for name in names), turn(array), strict=True)
                break
        else:
            tensors[path] = array
    return tensors
