"""Qwen2-MoE and Qwen3-MoE: Qwen 2 and 3 with experts in the place of some feed-forwards."""

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
from rootcellar.models.mixers import Attention
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
        router="mlp.gate.weight",
        experts_gate_up=("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        experts_down="mlp.experts.{expert}.down_proj.weight",
        shared_gate="mlp.shared_expert_gate.weight",
        shared_gate_up=("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        shared_down="mlp.shared_expert.down_proj.weight",
    ),
}


def feed_forwards(raw: Raw, *, renormalise: bool, shared: bool) -> list[Dense | Experts]:
    """Of each layer: experts in every ``decoder_sparse_step``-th but those that ``mlp_only_layers`` names.

    ``renormalise``: what ``norm_topk_prob`` is where it is not given; ``shared``: there is a gated shared expert.
    """
    activation, count = activation_of(raw), int(given(raw, "num_experts", 0))
    step, dense_only = size(raw, "decoder_sparse_step", 1), given(raw, "mlp_only_layers", ())

    def dense(field: str) -> Dense:
        return Dense(size(raw, field), activation=activation)

    def of(layer: int) -> Dense | Experts:
        if layer in dense_only or not count or (layer + 1) % step:
            return dense("intermediate_size")
        return Experts(
            Router(
                count, size(raw, "num_experts_per_tok"), renormalise=bool(given(raw, "norm_topk_prob", renormalise))
            ),
            size(raw, "moe_intermediate_size"),
            stored="apart",
            activation=activation,
            shared=dense("shared_expert_intermediate_size") if shared else None,
            shared_gate=shared,
        )

    return [of(layer) for layer in range(size(raw, "num_hidden_layers"))]


def _layers(raw: Raw, feed_forwards: list[Dense | Experts], **switches: Any) -> dict[str, Any]:
    rope, heads = read_rope(raw, size(raw, "max_position_embeddings")), heads_of(raw)
    rules = rules_of(raw, "full", "sliding_window")
    layers = tuple(
        LayerConfig(Attention(**heads, rule=rule, span=span, rope=rope, **switches), feed_forward)
        for (rule, span), feed_forward in zip(rules, feed_forwards, strict=True)
    )
    return {"layers": layers, "rope": rope}


def _qwen2(raw: Raw) -> dict[str, Any]:
    return _layers(raw, feed_forwards(raw, renormalise=False, shared=True), qkv_bias=bool(given(raw, "qkv_bias", True)))


def _qwen3(raw: Raw) -> dict[str, Any]:
    bias, norm = bool(raw.get("attention_bias")), Norm(float(given(raw, "rms_norm_eps", 1e-6)))
    experts = feed_forwards(raw, renormalise=False, shared=False)
    return _layers(raw, experts, qk_norm=norm, qkv_bias=bias, o_bias=bias)


FAMILIES = (Family("Qwen2MoeForCausalLM", _qwen2, NAMES), Family("Qwen3MoeForCausalLM", _qwen3, NAMES))
