"""DeepSeek V2 and V3 (and what shares their layers, R1 among it): latent attention, and experts in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.families.family import (
    DENSE_NAMES,
    NORM_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    given,
    layer_names,
    size,
)
from rootcellar.models.feed_forward import Dense, Experts
from rootcellar.models.mixers import LatentAttention
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.models.rope import RopeConfig, read_rope, yarn_mscale
from rootcellar.ops.experts import Router

EXPERT_NAMES = layer_names(
    router="mlp.gate.weight",
    correction="mlp.gate.e_score_correction_bias",
    experts_gate_up=("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    experts_down="mlp.experts.{expert}.down_proj.weight",
    shared_gate_up=("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    shared_down="mlp.shared_experts.down_proj.weight",
)
NAMES = {
    **TOP_NAMES,
    **NORM_NAMES,
    **DENSE_NAMES,
    **EXPERT_NAMES,
    **layer_names(
        q="self_attn.q_proj.weight",
        q_a="self_attn.q_a_proj.weight",
        q_a_bias="self_attn.q_a_proj.bias",
        q_a_norm="self_attn.q_a_layernorm.weight",
        q_b="self_attn.q_b_proj.weight",
        kv_a="self_attn.kv_a_proj_with_mqa.weight",
        kv_a_bias="self_attn.kv_a_proj_with_mqa.bias",
        kv_a_norm="self_attn.kv_a_layernorm.weight",
        kv_b="self_attn.kv_b_proj.weight",
        o="self_attn.o_proj.weight",
        o_bias="self_attn.o_proj.bias",
    ),
}


def _layers(raw: Raw, router: Router, dense: int, shared: int) -> dict[str, Any]:
    """``dense`` layers without experts, then layers with them, each with ``shared`` that every token goes through."""
    if given(raw, "moe_layer_freq", 1) != 1:
        raise ModelError(f"moe_layer_freq={raw['moe_layer_freq']} is not supported; known: 1")
    rope = replace(
        read_rope(raw, size(raw, "max_position_embeddings")), interleaved=bool(given(raw, "rope_interleave", True))
    )
    activation, inner = activation_of(raw), size(raw, "moe_intermediate_size")
    mixer = _latent(raw, rope)
    first = LayerConfig(mixer, Dense(size(raw, "intermediate_size"), activation=activation))
    always = Dense(inner * shared, activation=activation) if shared else None
    experts = Experts(router, inner, "apart", activation=activation, shared=always)
    layers = tuple(
        first if index < dense else LayerConfig(mixer, experts) for index in range(size(raw, "num_hidden_layers"))
    )
    return {"layers": layers, "rope": rope}


def _latent(raw: Raw, rope: RopeConfig) -> LatentAttention:
    straight, turned = size(raw, "qk_nope_head_dim", 128), size(raw, "qk_rope_head_dim", 64)
    fields = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    # Where the context is stretched, the scores are sharpened as well: once for queries and once for keys.
    sharper = yarn_mscale(rope.factor, float(fields.get("mscale_all_dim") or 0)) if rope.type != "default" else 1.0
    return LatentAttention(
        num_heads=size(raw, "num_attention_heads"),
        nope_dim=straight,
        rope_dim=turned,
        value_dim=size(raw, "v_head_dim", 128),
        kv_rank=size(raw, "kv_lora_rank", 512),
        q_rank=None if "q_lora_rank" in raw and raw["q_lora_rank"] is None else size(raw, "q_lora_rank", 1536),
        rope=rope,
        scale=(straight + turned) ** -0.5 * sharper**2,
        norm=Norm(1e-6),  # whatever rms_norm_eps says, as in DeepSeek's own code
        bias=bool(raw.get("attention_bias")),
    )


def _chosen_by(raw: Raw, default: str, known: tuple[str, ...], scores: str) -> str:
    method = str(given(raw, "topk_method", default))
    if method not in known:
        raise ModelError(f"topk_method={method!r} is not supported; known: {', '.join(map(repr, known))}")
    if given(raw, "scoring_func", scores) != scores:
        raise ModelError(f"scoring_func={raw['scoring_func']!r} is not supported; known: {scores!r}")
    return method


def _v2(raw: Raw) -> dict[str, Any]:
    method = _chosen_by(raw, "greedy", ("greedy", "group_limited_greedy"), "softmax")
    if raw.get("norm_topk_prob"):
        raise ModelError("norm_topk_prob=true is not supported: implementations of DeepSeek V2 differ in what it does")
    grouped = method == "group_limited_greedy"
    router = Router(
        size(raw, "n_routed_experts", 64),
        size(raw, "num_experts_per_tok"),
        scale=float(given(raw, "routed_scaling_factor", 1.0)),
        groups=size(raw, "n_group") if grouped else 1,
        top_groups=size(raw, "topk_group") if grouped else 1,
    )
    return _layers(raw, router, int(given(raw, "first_k_dense_replace", 0)), _shared(raw, 2))


def corrected_router(raw: Raw, *, experts: int, scale: float, groups: int, top_groups: int) -> Router:
    """The router of DeepSeek V3 and its like, sigmoids with a correction; what is named is what a config leaves out."""
    return Router(
        size(raw, "n_routed_experts", experts),
        size(raw, "num_experts_per_tok", 8),
        scores="sigmoid",
        renormalise=bool(given(raw, "norm_topk_prob", True)),
        scale=float(given(raw, "routed_scaling_factor", scale)),
        correction=True,
        groups=size(raw, "n_group", groups),
        top_groups=size(raw, "topk_group", top_groups),
    )


def _v3(raw: Raw) -> dict[str, Any]:
    _chosen_by(raw, "noaux_tc", ("noaux_tc",), "sigmoid")
    router = corrected_router(raw, experts=256, scale=2.5, groups=8, top_groups=4)
    return _layers(raw, router, int(given(raw, "first_k_dense_replace", 3)), _shared(raw, 1))


def _shared(raw: Raw, default: int) -> int:
    """Experts that every token goes through; null and 0 mean none."""
    return int(raw.get("n_shared_experts", default) or 0)


FAMILIES = (Family("DeepseekV2ForCausalLM", _v2, NAMES), Family("DeepseekV3ForCausalLM", _v3, NAMES))
