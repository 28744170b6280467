"""OLMo 2 and 3: norms after mixer and feed-forward alone, and over the queries (keys) of all heads together."""

from __future__ import annotations

from typing import Any

from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    TOP_NAMES,
    Family,
    Raw,
    activation_of,
    given,
    heads_of,
    layer_names,
    rope_of_rule,
    rules_of,
    size,
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
        attn_post_norm="post_attention_layernorm.weight",
        mlp_post_norm="post_feedforward_layernorm.weight",
    ),
}


def _layers(raw: Raw, rules: list[tuple[Any, int]], ropes: dict[str, RopeConfig]) -> dict[str, Any]:
    heads, bias = heads_of(raw), bool(raw.get("attention_bias"))
    norm = Norm(float(given(raw, "rms_norm_eps", 1e-5)))
    feed_forward = Dense(size(raw, "intermediate_size"), activation=activation_of(raw))

    def layer(rule: Any, span: int) -> LayerConfig:
        mixer = Attention(
            **heads, rule=rule, span=span, rope=ropes[rule], qk_norm=norm, qk_whole=True, qkv_bias=bias, o_bias=bias
        )
        return LayerConfig(mixer, feed_forward, pre_norms=False, post_norms=True)

    return {"layers": tuple(layer(*each) for each in rules), "norm": norm, "rope": ropes.get("full")}


def _olmo2(raw: Raw) -> dict[str, Any]:
    return _layers(raw, rules_of(raw, "full"), {"full": read_rope(raw, size(raw, "max_position_embeddings"))})


def _olmo3(raw: Raw) -> dict[str, Any]:
    rules = rules_of(raw, "full", "sliding_window")
    return _layers(raw, rules, {rule: rope_of_rule(raw, rule) for rule, _ in rules})


OLMO3_DEFAULTS: Raw = {"model_type": "olmo3", "sliding_window": 4096, "rope_theta": 500000.0}
FAMILIES = (Family("Olmo2ForCausalLM", _olmo2, NAMES), Family("Olmo3ForCausalLM", _olmo3, NAMES, OLMO3_DEFAULTS))
