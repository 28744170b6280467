"""Bamba: Mamba-2 layers with full attention now and then, and a gated feed-forward in each."""

from __future__ import annotations

from math import inf
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.families.family import (
    ATTENTION_NAMES,
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
from rootcellar.models.feed_forward import Dense
from rootcellar.models.mixers import Attention, Mamba2
from rootcellar.models.model import LayerConfig
from rootcellar.models.rope import read_rope

MAMBA_NAMES: Names = layer_names(
    mamba_in="mamba.in_proj.weight",
    mamba_in_bias="mamba.in_proj.bias",
    mamba_conv="mamba.conv1d.weight",
    mamba_conv_bias="mamba.conv1d.bias",
    mamba_dt_bias="mamba.dt_bias",
    mamba_a_log="mamba.A_log",
    mamba_d="mamba.D",
    mamba_norm="mamba.norm.weight",
    mamba_out="mamba.out_proj.weight",
    mamba_out_bias="mamba.out_proj.bias",
)
NAMES: Names = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.final_layernorm.weight",),
    "head": ("lm_head.weight",),
    **layer_names(
        attn_norm="input_layernorm.weight",
        mlp_norm="pre_ff_layernorm.weight",
        gate_up=("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"),
        gate_up_bias=("feed_forward.gate_proj.bias", "feed_forward.up_proj.bias"),
        down="feed_forward.down_proj.weight",
        down_bias="feed_forward.down_proj.bias",
    ),
    **ATTENTION_NAMES,
    **MAMBA_NAMES,
}


def check_step_limit(raw: Raw) -> None:
    """Raise ``ModelError`` where steps of Mamba-2 layers have a limit."""
    # transformers 5 writes infinity as an object, earlier ones as what Python's json calls it.
    limits = [inf if limit == {"__float__": "Infinity"} else limit for limit in given(raw, "time_step_limit", ())]
    if limits not in ([], [0, inf]):
        raise ModelError(f"time_step_limit={limits} is not supported: only steps without a limit are")


def read_mamba(raw: Raw) -> Mamba2:
    """The Mamba-2 layers of a config with fields ``mamba_*``."""
    check_step_limit(raw)
    heads, inner = size(raw, "mamba_n_heads"), size(raw, "mamba_expand", 2) * size(raw, "hidden_size")
    width = given(raw, "mamba_d_head", "auto")
    width = inner // heads if width == "auto" else size(raw, "mamba_d_head")
    if heads * width != inner:
        raise ModelError(f"mamba_n_heads={heads} of mamba_d_head={width} are not mamba_expand * hidden_size = {inner}")
    return Mamba2(
        heads=heads,
        head_dim=width,
        groups=size(raw, "mamba_n_groups", 1),
        state_size=size(raw, "mamba_d_state"),
        taps=size(raw, "mamba_d_conv"),
        eps=float(given(raw, "rms_norm_eps", 1e-5)),
        conv_bias=bool(given(raw, "mamba_conv_bias", True)),
        proj_bias=bool(given(raw, "mamba_proj_bias", False)),
    )


def _bamba(raw: Raw) -> dict[str, Any]:
    rope = read_rope(raw, size(raw, "max_position_embeddings"))
    bias = bool(raw.get("attention_bias"))
    attention = Attention(**heads_of(raw), rope=rope, qkv_bias=bias, o_bias=bias)
    mamba = read_mamba(raw)
    feed_forward = Dense(size(raw, "intermediate_size"), bool(raw.get("mlp_bias")), activation_of(raw))
    layers = tuple(
        LayerConfig(mamba if rule == "recurrent" else attention, feed_forward)
        for rule, _ in rules_of(raw, "full", "recurrent")
    )
    return {"layers": layers, "rope": rope}


FAMILIES = (Family("BambaForCausalLM", _bamba, NAMES, {"partial_rotary_factor": 0.5}),)
