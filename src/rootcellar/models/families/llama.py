"""Qwen2, Qwen3, Llama 2 and 3, Mistral, SmolLM3, Phi 3 and 4: norms before attention and a gated feed-forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    NORM_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    has_rope,
    heads_of,
    layer_names,
    refuse,
    rules_of,
    size,
)
from rootcellar.models.feed_forward import Dense
from rootcellar.models.mixers import Attention
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.models.rope import read_rope

NAMES = {**TOP_NAMES, **NORM_NAMES, **ATTENTION_NAMES, **DENSE_NAMES}
FUSED_GATE_UP = layer_names(gate_up=("mlp.gate_up_proj.weight",) * 2)
"""Gate and up in one tensor."""
PHI_NAMES = {**NAMES, **FUSED_GATE_UP, **layer_names(qkv=("self_attn.qkv_proj.weight",) * 3)}


def llama_layers(raw: Raw, *, head_dim: int | None = None, mlp_bias: bool = False, **switches: Any) -> dict[str, Any]:
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
    return llama_layers(raw, head_dim=128, qk_norm=Norm(float(raw.get("rms_norm_eps") or 1e-6)), **_biases(raw))


def _smollm3(raw: Raw) -> dict[str, Any]:
    """Llama, but for every fourth layer, which is not told positions."""
    if raw.get("use_sliding_window") and not raw.get("layer_types"):
        refuse(raw, "use_sliding_window")
    fields = llama_layers(raw, mlp_bias=bool(raw.get("mlp_bias")), **_biases(raw))
    layers = zip(fields["layers"], has_rope(raw), strict=True)
    plain = tuple(each if told else replace(each, mixer=replace(each.mixer, rope=None)) for each, told in layers)
    return {**fields, "layers": plain}


SMOLLM3_DEFAULTS: Raw = {"no_rope_layer_interval": 4, "rope_theta": 2000000.0, "tie_word_embeddings": True}
FAMILIES = (
    Family("Qwen2ForCausalLM", lambda raw: llama_layers(raw, qkv_bias=True), NAMES),
    Family("Qwen3ForCausalLM", _qwen3, NAMES),
    Family(
        "LlamaForCausalLM", lambda raw: llama_layers(raw, mlp_bias=bool(raw.get("mlp_bias")), **_biases(raw)), NAMES
    ),
    Family("MistralForCausalLM", llama_layers, NAMES),
    Family("SmolLM3ForCausalLM", _smollm3, NAMES, SMOLLM3_DEFAULTS),
    Family("Phi3ForCausalLM", llama_layers, PHI_NAMES, {"rms_norm_eps": 1e-5}),
)
