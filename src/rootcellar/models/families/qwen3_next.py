"""Qwen3-Next: gated delta nets with gated attention now and then, and experts beside a gated shared one."""

from __future__ import annotations

from typing import Any

from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    NORM_NAMES,
    TOP_NAMES,
    Family,
    Names,
    Raw,
    activation_of,
    given,
    heads_of,
    layer_names,
    rules_of,
    size,
)
from rootcellar.models.feed_forward import Dense, Experts
from rootcellar.models.mixers import Attention, GatedDelta
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.models.rope import read_rope
from rootcellar.ops.experts import Router

NAMES: Names = {
    **TOP_NAMES,
    **NORM_NAMES,
    **ATTENTION_NAMES,
    **DENSE_NAMES,
    **layer_names(
        delta_in="linear_attn.in_proj_qkvz.weight",
        delta_rates="linear_attn.in_proj_ba.weight",
        delta_conv="linear_attn.conv1d.weight",
        delta_dt_bias="linear_attn.dt_bias",
        delta_a_log="linear_attn.A_log",
        delta_norm="linear_attn.norm.weight",
        delta_out="linear_attn.out_proj.weight",
        router="mlp.gate.weight",
        experts_gate_up=("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        experts_down="mlp.experts.{expert}.down_proj.weight",
        shared_gate="mlp.shared_expert_gate.weight",
        shared_gate_up=("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        shared_down="mlp.shared_expert.down_proj.weight",
    ),
}


def _layers(raw: Raw) -> dict[str, Any]:
    eps = float(given(raw, "rms_norm_eps", 1e-6))
    norm = Norm(eps, offset=1.0)
    rope = read_rope(raw, size(raw, "max_position_embeddings"))
    bias = bool(raw.get("attention_bias"))
    attention = Attention(
        **heads_of(raw, head_dim=256), rope=rope, qkv_bias=bias, o_bias=bias, qk_norm=norm, gated=True
    )
    delta = GatedDelta(
        heads=size(raw, "linear_num_value_heads"),
        key_heads=size(raw, "linear_num_key_heads"),
        key_dim=size(raw, "linear_key_head_dim"),
        value_dim=size(raw, "linear_value_head_dim"),
        taps=size(raw, "linear_conv_kernel_dim"),
        eps=eps,
    )
    layers = tuple(
        LayerConfig(delta if rule == "recurrent" else attention, _feed_forward(raw, index))
        for index, (rule, _) in enumerate(rules_of(raw, "full", "recurrent"))
    )
    return {"layers": layers, "norm": norm, "rope": rope}


def _feed_forward(raw: Raw, layer: int) -> Dense | Experts:
    """Experts in every ``decoder_sparse_step``-th layer but those that ``mlp_only_layers`` names."""
    activation, experts = activation_of(raw), int(given(raw, "num_experts", 0))
    step = size(raw, "decoder_sparse_step", 1)
    if layer in given(raw, "mlp_only_layers", ()) or not experts or (layer + 1) % step:
        return Dense(size(raw, "intermediate_size"), activation=activation)
    return Experts(
        Router(experts, size(raw, "num_experts_per_tok"), renormalise=bool(given(raw, "norm_topk_prob", True))),
        size(raw, "moe_intermediate_size"),
        stored="apart",
        activation=activation,
        shared=Dense(size(raw, "shared_expert_intermediate_size"), activation=activation),
        shared_gate=True,
    )


DEFAULTS: Raw = {"full_attention_interval": 4, "partial_rotary_factor": 0.25}
FAMILIES = (Family("Qwen3NextForCausalLM", _layers, NAMES, DEFAULTS),)
