"""Gemma 2 and 3 (text): window layers between full ones, four norms a layer.

Gemma 3 has norms of queries and keys and a rotary embedding for each rule; Gemma 2 squashes the scores of attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    heads_of,
    layer_names,
    number,
    refuse,
    rope_of_rule,
    rules_of,
    size,
    within,
)
from rootcellar.models.feed_forward import Dense
from rootcellar.models.mixers import Attention
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.models.rope import RopeConfig, read_rope

NAMES = {
    **TOP_NAMES,
    **ATTENTION_NAMES,
    **DENSE_NAMES,
    **layer_names(
        attn_norm="input_layernorm.weight",
        attn_post_norm="post_attention_layernorm.weight",
        mlp_norm="pre_feedforward_layernorm.weight",
        mlp_post_norm="post_feedforward_layernorm.weight",
    ),
}


def _gemma2(raw: Raw) -> dict[str, Any]:
    rules, rope = rules_of(raw, "full", "sliding_window"), read_rope(raw, size(raw, "max_position_embeddings"))
    cap = raw.get("attn_logit_softcapping")
    return _layers(raw, rules, {rule: rope for rule, _ in rules}, softcap=float(cap) if cap else None)


def _gemma3(raw: Raw) -> dict[str, Any]:
    refuse(raw, "attn_logit_softcapping")
    rules = rules_of(raw, "full", "sliding_window")
    ropes = {rule: rope_of_rule(raw, rule) for rule, _ in rules}
    return _layers(raw, rules, ropes, qk_norm=_norm(raw))


def _norm(raw: Raw) -> Norm:
    return Norm(number(raw, "rms_norm_eps"), offset=1.0)


def _layers(
    raw: Raw, rules: Sequence[tuple[Any, int]], ropes: Mapping[str, RopeConfig], **switches: Any
) -> dict[str, Any]:
    """``switches`` are fields of ``Attention``."""
    refuse(raw, "use_bidirectional_attention")
    feed_forward = Dense(size(raw, "intermediate_size"), activation=activation_of(raw, "hidden_activation"))
    heads, bias = heads_of(raw), bool(raw.get("attention_bias"))
    scale = number(raw, "query_pre_attn_scalar") ** -0.5

    def layer(rule: Any, span: int) -> LayerConfig:
        mixer = Attention(
            **heads, rule=rule, span=span, rope=ropes[rule], scale=scale, qkv_bias=bias, o_bias=bias, **switches
        )
        return LayerConfig(mixer, feed_forward, post_norms=True)

    softcap = raw.get("final_logit_softcapping")
    return {
        "layers": tuple(layer(rule, span) for rule, span in rules),
        "norm": _norm(raw),
        "embed_scale": size(raw, "hidden_size") ** 0.5,
        "logit_softcap": None if softcap is None else float(softcap),
    }


DEFAULTS: Raw = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "vocab_size": 262208,
}
GEMMA2_DEFAULTS: Raw = {
    **{name: value for name, value in DEFAULTS.items() if not name.startswith("rope")},
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
    "vocab_size": 256000,
}
FAMILIES = (
    Family("Gemma2ForCausalLM", _gemma2, NAMES, GEMMA2_DEFAULTS),
    Family("Gemma3ForCausalLM", _gemma3, NAMES, DEFAULTS),
    Family("Gemma3ForConditionalGeneration", _gemma3, within("language_model", NAMES), DEFAULTS),
)
