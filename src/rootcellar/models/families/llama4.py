"""Llama 4 (text): chunks with rotary embeddings, full layers without; a shared expert and one of many more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    NORM_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    given,
    has_rope,
    heads_of,
    layer_names,
    number,
    rules_of,
    size,
    within,
)
from rootcellar.models.feed_forward import Dense, Experts
from rootcellar.models.mixers import Attention, Temperature
from rootcellar.models.model import LayerConfig
from rootcellar.models.rope import read_rope
from rootcellar.ops.experts import Router

NAMES = {
    **TOP_NAMES,
    **NORM_NAMES,
    **ATTENTION_NAMES,
    **layer_names(
        gate_up=("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"),
        down="feed_forward.down_proj.weight",
        router="feed_forward.router.weight",
        experts_gate_up="feed_forward.experts.gate_up_proj",
        experts_down="feed_forward.experts.down_proj",
        shared_gate_up=("feed_forward.shared_expert.gate_proj.weight", "feed_forward.shared_expert.up_proj.weight"),
        shared_down="feed_forward.shared_expert.down_proj.weight",
    ),
}


def _llama4(raw: Raw) -> dict[str, Any]:
    rules, ropes = rules_of(raw, "full", "chunked_local"), has_rope(raw)
    feed_forwards = _feed_forwards(raw, len(rules))
    return {
        "layers": tuple(
            LayerConfig(_attention(raw, rule, span, rope), feed_forward)
            for (rule, span), rope, feed_forward in zip(rules, ropes, feed_forwards, strict=True)
        )
    }


def _attention(raw: Raw, rule: Any, span: int, rope: bool) -> Attention:
    bias = bool(raw.get("attention_bias"))
    fields: dict[str, Any] = {**heads_of(raw), "rule": rule, "span": span, "qkv_bias": bias, "o_bias": bias}
    if rope:
        fields["rope"] = replace(read_rope(raw, size(raw, "max_position_embeddings")), interleaved=True)
        if raw["use_qk_norm"]:
            fields["qk_unit"] = number(raw, "rms_norm_eps")
    elif raw["attn_temperature_tuning"]:
        fields["temperature"] = Temperature(number(raw, "floor_scale"), number(raw, "attn_scale"))
    return Attention(**fields)


def _feed_forwards(raw: Raw, count: int) -> list[Dense | Experts]:
    """Experts in every ``interleave_moe_layer_step``-th layer, or in ``moe_layers``."""
    activation, inner = activation_of(raw), size(raw, "intermediate_size")
    step = size(raw, "interleave_moe_layer_step")
    sparse = given(raw, "moe_layers", range(step - 1, count, step))
    router = Router(size(raw, "num_local_experts"), size(raw, "num_experts_per_tok"), scores="sigmoid")
    shared = Dense(inner, activation=activation)
    experts = Experts(router, inner, "halves", activation=activation, weigh="inputs", shared=shared)
    if all(index in sparse for index in range(count)):
        return [experts] * count
    dense = Dense(size(raw, "intermediate_size_mlp"), activation=activation)
    return [experts if index in sparse else dense for index in range(count)]


DEFAULTS: Raw = {
    "model_type": "llama4_text",
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "head_dim": 128,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_qk_norm": True,
}
FAMILIES = (
    Family("Llama4ForCausalLM", _llama4, NAMES, DEFAULTS),
    Family("Llama4ForConditionalGeneration", _llama4, within("language_model", NAMES), DEFAULTS),
)
