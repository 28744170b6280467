"""Gemma 2, 3 and 4: window layers between full ones, four norms a layer.

Gemma 3 has norms of queries and keys and a rotary embedding for each rule, and sees pictures, in both directions;
Gemma 2 squashes the scores of attention. Full layers of Gemma 4 have heads of their own, whose values are their keys
before these are normed and turned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.encoders import Gemma3Vision
from rootcellar.models.families.family import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    TOP_NAMES,
    Family,
    Names,
    Raw,
    activation_of,
    colours,
    given,
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


def _gemma4(raw: Raw) -> dict[str, Any]:
    """The dense models. Those with a vector of each token for each layer, layers that attend over the KV of another, or
    experts are refused.
    """
    refuse(raw, "hidden_size_per_layer_input", "num_kv_shared_layers", "enable_moe_block", "attention_bias")
    if raw.get("use_bidirectional_attention") != "vision":  # without pictures there is no difference
        refuse(raw, "use_bidirectional_attention")
    rules = rules_of(raw, "full", "sliding_window")
    if rules[-1][0] != "full":
        raise ModelError("the last of layer_types must be full_attention")
    norm = Norm(number(raw, "rms_norm_eps"))
    dense = Dense(size(raw, "intermediate_size"), activation=activation_of(raw, "hidden_activation"))
    one = bool(raw.get("attention_k_eq_v"))
    apart = {"head_dim": size(raw, "global_head_dim")}
    if one:
        apart["num_key_value_heads"] = size(raw, "num_global_key_value_heads", size(raw, "num_key_value_heads"))

    def layer(rule: Any, span: int) -> LayerConfig:
        heads = heads_of({**raw, **apart} if rule == "full" else raw)
        mixer = Attention(
            **heads, rule=rule, span=span, rope=rope_of_rule(raw, rule), scale=1.0, qk_norm=norm, v_unit=norm.eps,
            one_kv=one and rule == "full",
        )  # fmt: skip
        return LayerConfig(mixer, dense, post_norms=True, scaled=True)

    softcap = raw.get("final_logit_softcapping")
    return {
        "layers": tuple(layer(rule, span) for rule, span in rules),
        "norm": norm,
        "embed_scale": size(raw, "hidden_size") ** 0.5,
        "logit_softcap": None if softcap is None else float(softcap),
    }


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


def _gemma3_seeing(raw: Raw) -> dict[str, Any]:
    """With its encoder; the language model alone where the config has none."""
    read, vision = _gemma3(raw), raw.get("vision_config")
    if vision is None:
        return read
    seen: Raw = given(raw, "image_processor", {})
    refuse(seen, "do_pan_and_scan")
    tokens = math.isqrt(size(raw, "mm_tokens_per_image", 256))
    for layer in read["layers"]:
        if 0 < layer.mixer.span < tokens**2:
            raise ModelError(
                f"sliding_window={layer.mixer.span} is less than mm_tokens_per_image={tokens**2}: not supported"
            )
    side = size(vision, "image_size", 224)
    for name in ("height", "width"):
        if size(given(seen, "size", {}), name, side) != side:
            raise ModelError(f"preprocessor_config.json: size must be {side} x {side}, the image_size of vision_config")
    if given(vision, "num_channels", 3) != 3:
        raise ModelError(f"vision_config.num_channels={vision['num_channels']} is not supported: it must be 3")
    fields = {"mean": colours(seen, "image_mean"), "deviation": colours(seen, "image_std")}
    encoder = Gemma3Vision(
        token=int(given(raw, "image_token_index", given(raw, "image_token_id", 262144))),
        depth=size(vision, "num_hidden_layers", 12),
        hidden_size=size(vision, "hidden_size", 768),
        intermediate_size=size(vision, "intermediate_size", 3072),
        heads=size(vision, "num_attention_heads", 12),
        side=side,
        patch=size(vision, "patch_size", 16),
        tokens=tokens,
        activation=activation_of(vision, default="gelu_pytorch_tanh"),
        eps=float(given(vision, "layer_norm_eps", 1e-6)),
        **{name: value for name, value in fields.items() if value is not None},
    )
    return {**read, "encoder": encoder}


_BLOCK = {
    "vision_o": "self_attn.out_proj",
    "vision_up": "mlp.fc1",
    "vision_down": "mlp.fc2",
    "vision_norm": "layer_norm1",
    "vision_mlp_norm": "layer_norm2",
}
_OUTSIDE = {"patch": "embeddings.patch_embedding", "vision_last_norm": "post_layernorm"}
_TOWER = "vision_tower.vision_model."
_LAYER = f"{_TOWER}encoder.layers.{{layer}}."
SEEING_NAMES: Names = {
    **within("language_model", NAMES),
    **{
        name + bias: (f"{where}{source}.{kind}",)
        for bias, kind in (("", "weight"), ("_bias", "bias"))
        for where, table in ((_LAYER, _BLOCK), (_TOWER, _OUTSIDE))
        for name, source in table.items()
    },
    "vision_qkv": tuple(f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
    "vision_qkv_bias": tuple(f"{_LAYER}self_attn.{x}_proj.bias" for x in "qkv"),
    "places": (f"{_TOWER}embeddings.position_embedding.weight",),
    "merge_norm": ("multi_modal_projector.mm_soft_emb_norm.weight",),
    "merge": ("multi_modal_projector.mm_input_projection_weight",),
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
GEMMA4_NAMES: Names = {
    **NAMES,
    **layer_names(
        scale="layer_scalar",
        qk=tuple(f"self_attn.{x}_proj.weight" for x in "qk"),
    ),
}
GEMMA4_DEFAULTS: Raw = {
    "model_type": "gemma4_text",
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "vocab_size": 262144,
}
FAMILIES = (
    Family("Gemma4ForCausalLM", _gemma4, GEMMA4_NAMES, GEMMA4_DEFAULTS),
    Family(
        "Gemma4ForConditionalGeneration",
        _gemma4,
        {n: tuple(s.replace("model.", "model.language_model.", 1) for s in each) for n, each in GEMMA4_NAMES.items()},
        GEMMA4_DEFAULTS,
    ),
    Family("Gemma2ForCausalLM", _gemma2, NAMES, GEMMA2_DEFAULTS),
    Family("Gemma3ForCausalLM", _gemma3, NAMES, DEFAULTS),
    Family("Gemma3ForConditionalGeneration", _gemma3_seeing, SEEING_NAMES, DEFAULTS),
)
