"""Gemma 3 (text): five window layers for each full one, each rule with its own rotary embedding, four norms a layer."""

from __future__ import annotations

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


def _gemma3(raw: Raw) -> dict[str, Any]:
    refuse(raw, "use_bidirectional_attention", "attn_logit_softcapping")
    norm = Norm(number(raw, "rms_norm_eps"), offset=1.0)
    ropes = {"full": _rope(raw, "full_attention"), "sliding_window": _rope(raw, "sliding_attention")}
    feed_forward = Dense(size(raw, "intermediate_size"), activation=activation_of(raw, "hidden_activation"))
    heads, bias = heads_of(raw), bool(raw.get("attention_bias"))
    scale = number(raw, "query_pre_attn_scalar") ** -0.5

    def layer(rule: Any, span: int) -> LayerConfig:
        mixer = Attention(
            **heads, rule=rule, span=span, rope=ropes[rule], scale=scale, qk_norm=norm, qkv_bias=bias, o_bias=bias
        )
        return LayerConfig(mixer, feed_forward, post_norms=True)

    softcap = raw.get("final_logit_softcapping")
    return {
        "layers": tuple(layer(rule, span) for rule, span in rules_of(raw, "full", "sliding_window")),
        "norm": norm,
        "embed_scale": size(raw, "hidden_size") ** 0.5,
        "logit_softcap": None if softcap is None else float(softcap),
    }


def _rope(raw: Raw, kind: str) -> RopeConfig:
    """``rope_parameters`` by kind of layer (transformers from 5 on), or scaling for full layers alone (before)."""
    sliding = kind == "sliding_attention"
    fields = (raw.get("rope_parameters") or {}).get(kind)
    if fields is None:
        fields = {} if sliding else dict(raw.get("rope_scaling") or {})
        fields["rope_theta"] = raw["rope_local_base_freq" if sliding else "rope_theta"]
    return read_rope({"rope_parameters": fields}, size(raw, "max_position_embeddings"))


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
FAMILIES = (
    Family("Gemma3ForCausalLM", _gemma3, NAMES, DEFAULTS),
    Family("Gemma3ForConditionalGeneration", _gemma3, within("language_model", NAMES), DEFAULTS),
)
