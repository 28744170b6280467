"""Nemotron-H: Mamba-2 layers with full attention now and then, which knows no positions; feed-forwards without gates.

Its checkpoints number every mixer and every feed-forward as a layer of its own. Here a feed-forward belongs to the
mixer before it, and a mixer that none follows has none.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from rootcellar.errors import ConfigError, ModelError
from rootcellar.models.families.bamba import MAMBA_NAMES, check_step_limit
from rootcellar.models.families.family import Family, Names, Raw, activation_of, given, heads_of, refuse, size
from rootcellar.models.feed_forward import Dense
from rootcellar.models.mixers import Attention, Mamba2
from rootcellar.models.model import LayerConfig
from rootcellar.models.norms import Norm
from rootcellar.plan.layers import BESIDE, layers_named


def _names(place: str, **suffixes: str) -> dict[str, tuple[str, ...]]:
    return {name: (f"backbone.layers.{place}.{suffix}",) for name, suffix in suffixes.items()}


NAMES: Names = {
    "embed": ("backbone.embeddings.weight",),
    "norm": ("backbone.norm_f.weight",),
    "head": ("lm_head.weight",),
    "qkv": tuple(f"backbone.layers.{{layer}}.mixer.{x}_proj.weight" for x in "qkv"),
    **_names("{layer}", attn_norm="norm.weight", o="mixer.o_proj.weight"),
    **{
        name: tuple(source.replace("model.layers.{layer}.mamba.", "backbone.layers.{layer}.mixer.") for source in each)
        for name, each in MAMBA_NAMES.items()
    },
    **_names(
        "{feed_forward}",
        mlp_norm="norm.weight",
        up="mixer.up_proj.weight",
        up_bias="mixer.up_proj.bias",
        down="mixer.down_proj.weight",
        down_bias="mixer.down_proj.bias",
    ),
}


def _nemotron(raw: Raw) -> dict[str, Any]:
    refuse(raw, "attention_bias", "sliding_window")
    try:
        named = layers_named(raw)
    except ConfigError as error:
        raise ModelError(str(error)) from None
    if len(named) != size(raw, "num_hidden_layers"):
        raise ModelError(
            f"layers_block_type names {len(named)} layers, num_hidden_layers is {raw['num_hidden_layers']}"
        )
    if not named or named[0] in BESIDE or any(a in BESIDE and b in BESIDE for a, b in pairwise(named)):
        raise ModelError(
            f"layers_block_type must begin with a mixer and have one before each feed-forward, not {named}"
        )
    if "moe" in named:
        raise ModelError("layers of experts without gates ('moe', 'E' in hybrid_override_pattern) are not supported")
    attention = Attention(**heads_of(raw, int(given(raw, "attention_head_dim", 128))), rope=None)
    mamba = _mamba(raw)
    activation = activation_of(raw, "mlp_hidden_act", "relu2")
    dense = Dense(size(raw, "intermediate_size"), bool(raw.get("mlp_bias")), activation, gated=False)
    layers = []
    for at, (name, after) in enumerate(pairwise([*named, "mamba"])):
        if name not in BESIDE:
            mixer = attention if name in ("attention", "full_attention") else mamba
            layers.append(LayerConfig(mixer, dense if after in BESIDE else None, numbers=(at, at + 1)))
    return {"layers": tuple(layers), "norm": Norm(_eps(raw))}


def _eps(raw: Raw) -> float:
    return float(given(raw, "layer_norm_epsilon", 1e-5))


def _mamba(raw: Raw) -> Mamba2:
    check_step_limit(raw)
    return Mamba2(
        heads=size(raw, "mamba_num_heads"),
        head_dim=size(raw, "mamba_head_dim"),
        groups=size(raw, "n_groups", 1),
        state_size=size(raw, "ssm_state_size"),
        taps=size(raw, "conv_kernel"),
        eps=_eps(raw),
        conv_bias=bool(given(raw, "use_conv_bias", True)),
        proj_bias=bool(raw.get("use_bias")),
    )


FAMILIES = (Family("NemotronHForCausalLM", _nemotron, NAMES),)
