"""GLM 4: half of each head is turned, gate and up in one tensor, norms around (GLM-4-0414); GLM 4.5: experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rootcellar.models.families.deepseek import EXPERT_NAMES, corrected_router
from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    NORM_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    given,
    heads_of,
    layer_names,
    rules_of,
    size,
)
from rootcellar.models.families.llama import FUSED_GATE_UP
from rootcellar.models.feed_forward import Dense, Experts
from rootcellar.models.mixers import Attention
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.models.rope import read_rope

NAMES = {**TOP_NAMES, **NORM_NAMES, **ATTENTION_NAMES, **DENSE_NAMES, **FUSED_GATE_UP}
GLM4_NAMES = {
    **NAMES,
    **layer_names(attn_post_norm="post_self_attn_layernorm.weight", mlp_post_norm="post_mlp_layernorm.weight"),
}
MOE_NAMES = {**TOP_NAMES, **NORM_NAMES, **ATTENTION_NAMES, **DENSE_NAMES, **EXPERT_NAMES}


def _glm(raw: Raw, *, post_norms: bool) -> dict[str, Any]:
    rope = replace(read_rope(raw, size(raw, "max_position_embeddings")), interleaved=True)
    attention = Attention(**heads_of(raw, 128), rope=rope, qkv_bias=bool(given(raw, "attention_bias", True)))
    layer = LayerConfig(attention, Dense(size(raw, "intermediate_size"), activation=activation_of(raw)))
    return {"layers": (replace(layer, post_norms=post_norms),) * len(rules_of(raw, "full")), "rope": rope}


def _glm_moe(raw: Raw) -> dict[str, Any]:
    rope, activation = read_rope(raw, size(raw, "max_position_embeddings")), activation_of(raw)
    norm = Norm(float(given(raw, "rms_norm_eps", 1e-5))) if raw.get("use_qk_norm") else None
    attention = Attention(**heads_of(raw), rope=rope, qk_norm=norm, qkv_bias=bool(raw.get("attention_bias")))
    router = corrected_router(raw, experts=128, scale=1.0, groups=1, top_groups=1)
    inner, shared = size(raw, "moe_intermediate_size"), int(given(raw, "n_shared_experts", 1))
    always = Dense(inner * shared, activation=activation) if shared else None
    experts = LayerConfig(attention, Experts(router, inner, "apart", activation=activation, shared=always))
    first = LayerConfig(attention, Dense(size(raw, "intermediate_size"), activation=activation))
    dense = int(given(raw, "first_k_dense_replace", 1))
    layers = tuple(first if index < dense else experts for index in range(len(rules_of(raw, "full"))))
    return {"layers": layers, "rope": rope}


HALF: Raw = {"partial_rotary_factor": 0.5}
FAMILIES = (
    Family("GlmForCausalLM", lambda raw: _glm(raw, post_norms=False), NAMES, HALF),
    Family("Glm4ForCausalLM", lambda raw: _glm(raw, post_norms=True), GLM4_NAMES, HALF),
    Family("Glm4MoeForCausalLM", _glm_moe, MOE_NAMES, HALF),
)
