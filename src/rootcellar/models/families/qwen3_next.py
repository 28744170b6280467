"""Qwen3-Next: gated delta nets with gated attention now and then, and experts beside a gated shared one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rootcellar.models.families import qwen_moe
from rootcellar.models.families.family import Family, Names, Raw, given, heads_of, layer_names, rules_of, size
from rootcellar.models.families.qwen_moe import feed_forwards
from rootcellar.models.feed_forward import Dense, Experts
from rootcellar.models.mixers import Attention, GatedDelta
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.models.rope import read_rope

NAMES: Names = {
    **qwen_moe.NAMES,
    **layer_names(
        delta_in="linear_attn.in_proj_qkvz.weight",
        delta_rates="linear_attn.in_proj_ba.weight",
        delta_conv="linear_attn.conv1d.weight",
        delta_dt_bias="linear_attn.dt_bias",
        delta_a_log="linear_attn.A_log",
        delta_norm="linear_attn.norm.weight",
        delta_out="linear_attn.out_proj.weight",
    ),
}


def _layers(raw: Raw) -> dict[str, Any]:
    return delta_layers(raw, feed_forwards(raw, renormalise=True, shared=True))


def delta_layers(raw: Raw, feed_forwards: Sequence[Dense | Experts], *, apart: bool = False) -> dict[str, Any]:
    """Gated delta nets and gated attention in turn, as ``raw`` says; ``apart``: see ``GatedDelta``."""
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
        apart=apart,
    )
    layers = tuple(
        LayerConfig(delta if rule == "recurrent" else attention, feed_forward)
        for (rule, _), feed_forward in zip(rules_of(raw, "full", "recurrent"), feed_forwards, strict=True)
    )
    return {"layers": layers, "norm": norm, "rope": rope}


DEFAULTS: Raw = {"full_attention_interval": 4, "partial_rotary_factor": 0.25}
FAMILIES = (Family("Qwen3NextForCausalLM", _layers, NAMES, DEFAULTS),)
