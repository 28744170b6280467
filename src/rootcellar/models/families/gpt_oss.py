"""gpt-oss: window and full layers take turns, attention sinks, experts whose gate is clamped."""

from __future__ import annotations

from typing import Any

from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    NORM_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    heads_of,
    layer_names,
    number,
    rules_of,
    size,
)
from rootcellar.models.feed_forward import Clamp, Experts
from rootcellar.models.mixers import Attention
from rootcellar.models.model import LayerConfig
from rootcellar.models.rope import read_rope
from rootcellar.ops.experts import Router

NAMES = {
    **TOP_NAMES,
    **NORM_NAMES,
    **ATTENTION_NAMES,
    **layer_names(
        sinks="self_attn.sinks",
        router="mlp.router.weight",
        router_bias="mlp.router.bias",
        experts_gate_up="mlp.experts.gate_up_proj",
        experts_gate_up_bias="mlp.experts.gate_up_proj_bias",
        experts_down="mlp.experts.down_proj",
        experts_down_bias="mlp.experts.down_proj_bias",
    ),
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(raw: Raw) -> dict[str, Any]:
    activation_of(raw)
    scaled = raw.get("rope_scaling") or raw.get("rope_parameters")
    rope = read_rope(raw if scaled else {**raw, "rope_scaling": _ROPE}, size(raw, "max_position_embeddings"))
    bias = bool(raw["attention_bias"])
    experts = Experts(
        Router(size(raw, "num_local_experts"), size(raw, "num_experts_per_tok"), renormalise=True),
        size(raw, "intermediate_size"),
        "interleaved",
        bias=True,
        router_bias=True,
        clamp=Clamp(number(raw, "swiglu_limit"), number(raw, "swiglu_alpha")),
    )
    heads = heads_of(raw)
    return {
        "layers": tuple(
            LayerConfig(
                Attention(**heads, rule=rule, span=span, rope=rope, qkv_bias=bias, o_bias=bias, sinks=True), experts
            )
            for rule, span in rules_of(raw, "full", "sliding_window")
        )
    }


DEFAULTS: Raw = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
FAMILIES = (Family("GptOssForCausalLM", _gpt_oss, NAMES, DEFAULTS),)
