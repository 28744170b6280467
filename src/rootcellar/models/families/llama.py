"""Qwen2, Qwen3, Llama 2 and 3, Mistral: pre-norm decoders of attention and a gated feed-forward."""

from __future__ import annotations

from typing import Any

from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    NORM_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    heads_of,
    rules_of,
    size,
)
from rootcellar.models.feed_forward import Dense
from rootcellar.models.mixers import Attention
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.models.rope import read_rope

NAMES = {**TOP_NAMES, **NORM_NAMES, **ATTENTION_NAMES, **DENSE_NAMES}


def _layers(raw: Raw, *, head_dim: int | None = None, mlp_bias: bool = False, **switches: Any) -> dict[str, Any]:
    """Layers that differ in what they see alone; ``switches`` are fields of ``Attention``."""
    rope = read_rope(raw, size(raw, "max_position_embeddings"))
    feed_forward = Dense(size(raw, "intermediate_size"), mlp_bias, activation_of(raw))
    heads = heads_of(raw, head_dim)
    layers = tuple(
        LayerConfig(Attention(**heads, rule=rule, span=span, rope=rope, **switches), feed_forward)
        for rule, span in rules_of(raw, "full", "sliding_window")
    )
    return {"layers": layers, "rope": rope}


def _biases(raw: Raw) -> dict[str, bool]:
    bias = bool(raw.get("attention_bias"))
    return {"qkv_bias": bias, "o_bias": bias}


def _qwen3(raw: Raw) -> dict[str, Any]:
    return _layers(raw, head_dim=128, qk_norm=Norm(float(raw.get("rms_norm_eps") or 1e-6)), **_biases(raw))


FAMILIES = (
    Family("Qwen2ForCausalLM", lambda raw: _layers(raw, qkv_bias=True), NAMES),
    Family("Qwen3ForCausalLM", _qwen3, NAMES),
    Family("LlamaForCausalLM", lambda raw: _layers(raw, mlp_bias=bool(raw.get("mlp_bias")), **_biases(raw)), NAMES),
    Family("MistralForCausalLM", _layers, NAMES),
)
