"""Qwen3.5: Qwen3-Next's layers with dense feed-forwards, rotary positions of three axes, and an encoder of pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.encoders import Qwen35Vision
from rootcellar.models.encoders.qwen3_5 import side_of
from rootcellar.models.families import llama, qwen3_next
from rootcellar.models.families.family import Family, Names, Raw, activation_of, layer_names, need, refuse, size
from rootcellar.models.families.qwen2_5_vl import vision_fields
from rootcellar.models.feed_forward import Dense

_BLOCK = {
    "vision_qkv": "attn.qkv",
    "vision_o": "attn.proj",
    "vision_up": "mlp.linear_fc1",
    "vision_down": "mlp.linear_fc2",
    "vision_norm": "norm1",
    "vision_mlp_norm": "norm2",
}
_OUTSIDE = {
    "patch": "patch_embed.proj",
    "merge_norm": "merger.norm",
    "merge_in": "merger.linear_fc1",
    "merge_out": "merger.linear_fc2",
}
_TEXT: Names = {
    **llama.NAMES,
    **layer_names(
        delta_in=("linear_attn.in_proj_qkv.weight",) * 3 + ("linear_attn.in_proj_z.weight",),
        delta_rates=("linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"),
        delta_conv="linear_attn.conv1d.weight",
        delta_dt_bias="linear_attn.dt_bias",
        delta_a_log="linear_attn.A_log",
        delta_norm="linear_attn.norm.weight",
        delta_out="linear_attn.out_proj.weight",
    ),
}
NAMES: Names = {
    **{
        name: tuple(source.replace("model.", "model.language_model.", 1) for source in sources)
        for name, sources in _TEXT.items()
    },
    "places": ("model.visual.pos_embed.weight",),
    **{
        name + bias: (f"model.visual.{where}{source}.{kind}",)
        for bias, kind in (("", "weight"), ("_bias", "bias"))
        for where, table in (("blocks.{layer}.", _BLOCK), ("", _OUTSIDE))
        for name, source in table.items()
    },
}


def _text(raw: Raw) -> dict[str, Any]:
    dense = Dense(size(raw, "intermediate_size"), activation=activation_of(raw))
    read = qwen3_next.delta_layers(raw, [dense] * size(raw, "num_hidden_layers"), apart=True)
    if not read["rope"].sections:
        raise ModelError("the field 'mrope_section' is missing from rope_parameters")
    rope = replace(read["rope"], alternate=True)  # whatever mrope_interleaved says, as in transformers
    layers = tuple(
        replace(each, mixer=replace(each.mixer, rope=rope)) if each.mixer.rule == "full" else each
        for each in read["layers"]
    )
    return {**read, "layers": layers, "rope": rope}


def _seeing(raw: Raw) -> dict[str, Any]:
    vision = need(raw, "vision_config")
    refuse(vision, "deepstack_visual_indexes")
    encoder = Qwen35Vision(
        **vision_fields(raw, patch=16),
        grid=side_of(size(vision, "num_position_embeddings", 48**2)),
        activation=activation_of(vision, default="gelu_pytorch_tanh"),
    )
    return {**_text(raw), "encoder": encoder}


DEFAULTS: Raw = {**qwen3_next.DEFAULTS, "model_type": "qwen3_5"}
FAMILIES = (
    Family("Qwen3_5ForConditionalGeneration", _seeing, NAMES, DEFAULTS),
    Family("Qwen3_5ForCausalLM", _text, _TEXT, DEFAULTS),
)
