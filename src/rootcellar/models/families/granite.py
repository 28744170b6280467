"""Granite 4: Mamba-2 layers with full attention now and then, or attention alone; experts beside a shared part."""

from __future__ import annotations

from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.families.bamba import MAMBA_NAMES, read_mamba
from rootcellar.models.families.family import (
    ATTENTION_NAMES,
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
from rootcellar.models.mixers import Attention
from rootcellar.models.model import LayerConfig
from rootcellar.models.rope import read_rope
from rootcellar.ops.experts import Router

_SHARED = {"gate_up": ("shared_mlp.input_linear.weight",) * 2, "down": "shared_mlp.output_linear.weight"}
NAMES: Names = {
    **TOP_NAMES,
    **NORM_NAMES,
    **ATTENTION_NAMES,
    **MAMBA_NAMES,
    **layer_names(
        **_SHARED,
        **{f"shared_{name}": source for name, source in _SHARED.items()},
        router="block_sparse_moe.router.layer.weight",
        experts_gate_up="block_sparse_moe.input_linear.weight",
        experts_down="block_sparse_moe.output_linear.weight",
    ),
}


def _granite(raw: Raw) -> dict[str, Any]:
    told = given(raw, "position_embedding_type", "nope")
    if told not in ("nope", "rope"):
        raise ModelError(f"position_embedding_type={told!r} is not supported; known: 'nope', 'rope'")
    rope = read_rope(raw, size(raw, "max_position_embeddings")) if told == "rope" else None
    bias = bool(raw.get("attention_bias"))
    attention = Attention(
        **heads_of(raw), rope=rope, scale=_multiplier(raw, "attention_multiplier"), qkv_bias=bias, o_bias=bias
    )
    rules = rules_of(raw, "full", "recurrent")
    mamba = read_mamba(raw) if any(rule == "recurrent" for rule, _ in rules) else None
    feed_forward = _feed_forward(raw)
    return {
        "layers": tuple(
            LayerConfig(mamba if mamba is not None and rule == "recurrent" else attention, feed_forward)
            for rule, _ in rules
        ),
        "rope": rope,
        "embed_scale": _multiplier(raw, "embedding_multiplier"),
        "residual_scale": _multiplier(raw, "residual_multiplier"),
        "logit_scale": 1 / _multiplier(raw, "logits_scaling"),
    }


def _multiplier(raw: Raw, name: str) -> float:
    return float(given(raw, name, 1.0))


def _feed_forward(raw: Raw) -> Dense | Experts:
    activation, experts = activation_of(raw), int(given(raw, "num_local_experts", 0))
    shared = Dense(size(raw, "shared_intermediate_size"), activation=activation)
    if not experts:
        return shared
    router = Router(experts, size(raw, "num_experts_per_tok"), renormalise=True)
    return Experts(router, size(raw, "intermediate_size"), "linear", activation=activation, shared=shared)


FAMILIES = (Family("GraniteMoeHybridForCausalLM", _granite, NAMES),)
