"""Qwen2.5-VL: Qwen 2 with rotary positions of three axes, and an encoder of pictures before it."""

from __future__ import annotations

from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.encoders import Qwen25Vision
from rootcellar.models.families import llama
from rootcellar.models.families.family import Family, Names, Raw, activation_of, colours, given, need, size

_VISION = {
    "vision_qkv": "attn.qkv.weight",
    "vision_qkv_bias": "attn.qkv.bias",
    "vision_o": "attn.proj.weight",
    "vision_o_bias": "attn.proj.bias",
    "vision_gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "vision_gate_up_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "vision_down": "mlp.down_proj.weight",
    "vision_down_bias": "mlp.down_proj.bias",
    "vision_norm": "norm1.weight",
    "vision_mlp_norm": "norm2.weight",
}
NAMES: Names = {
    **llama.NAMES,
    "patch": ("visual.patch_embed.proj.weight",),
    "merge_norm": ("visual.merger.ln_q.weight",),
    "merge_in": ("visual.merger.mlp.0.weight",),
    "merge_in_bias": ("visual.merger.mlp.0.bias",),
    "merge_out": ("visual.merger.mlp.2.weight",),
    "merge_out_bias": ("visual.merger.mlp.2.bias",),
    **{
        name: tuple(f"visual.blocks.{{layer}}.{x}" for x in ((source,) if isinstance(source, str) else source))
        for name, source in _VISION.items()
    },
}


def _layers(raw: Raw) -> dict[str, Any]:
    read = llama.llama_layers(raw, qkv_bias=True)
    if not read["rope"].sections:
        raise ModelError("the field 'mrope_section' is missing from rope_scaling (or rope_parameters)")
    return {**read, "encoder": _encoder(raw)}


def _encoder(raw: Raw) -> Qwen25Vision:
    vision = need(raw, "vision_config")
    return Qwen25Vision(
        **vision_fields(raw, patch=14),
        window=size(vision, "window_size", 112),
        full=tuple(given(vision, "fullatt_block_indexes", (7, 15, 23, 31))),
        activation=activation_of(vision),
    )


def vision_fields(raw: Raw, patch: int) -> dict[str, Any]:
    """What the encoders of Qwen's models read alike; ``patch``: pixels of a patch's side where it is not given."""
    vision, seen = need(raw, "vision_config"), given(raw, "image_processor", {})
    limits = given(seen, "size", {})
    fields: dict[str, Any] = {
        "least": given(seen, "min_pixels", limits.get("shortest_edge")),
        "most": given(seen, "max_pixels", limits.get("longest_edge")),
        "mean": colours(seen, "image_mean"),
        "deviation": colours(seen, "image_std"),
    }
    for name, value in (("out_hidden_size", size(raw, "hidden_size")), ("in_channels", 3)):
        if given(vision, name, given(vision, "in_chans", value) if name == "in_channels" else value) != value:
            raise ModelError(f"vision_config.{name}={vision[name]} is not supported: it must be {value}")
    return {
        "token": int(need(raw, "image_token_id")),
        "depth": size(vision, "depth"),
        "hidden_size": size(vision, "hidden_size"),
        "intermediate_size": size(vision, "intermediate_size"),
        "heads": size(vision, "num_heads"),
        "patch": size(vision, "patch_size", patch),
        "merge": size(vision, "spatial_merge_size", 2),
        "frames": size(vision, "temporal_patch_size", 2),
        "theta": float((vision.get("rope_parameters") or {}).get("rope_theta") or 10000.0),
        **{name: value for name, value in fields.items() if value is not None},
    }


FAMILIES = (Family("Qwen2_5_VLForConditionalGeneration", _layers, NAMES),)
