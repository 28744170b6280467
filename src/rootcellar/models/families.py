"""The known architectures: one row each, a config mapping and a weight-name table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rootcellar.errors import ModelError

LLAMA_NAMES: Mapping[str, tuple[str, ...]] = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attn_norm": ("model.layers.{layer}.input_layernorm.weight",),
    "qkv": tuple(f"model.layers.{{layer}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "qkv_bias": tuple(f"model.layers.{{layer}}.self_attn.{x}_proj.bias" for x in "qkv"),
    "q_norm": ("model.layers.{layer}.self_attn.q_norm.weight",),
    "k_norm": ("model.layers.{layer}.self_attn.k_norm.weight",),
    "o": ("model.layers.{layer}.self_attn.o_proj.weight",),
    "o_bias": ("model.layers.{layer}.self_attn.o_proj.bias",),
    "mlp_norm": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "gate_up": tuple(f"model.layers.{{layer}}.mlp.{x}_proj.weight" for x in ("gate", "up")),
    "gate_up_bias": tuple(f"model.layers.{{layer}}.mlp.{x}_proj.bias" for x in ("gate", "up")),
    "down": ("model.layers.{layer}.mlp.down_proj.weight",),
    "down_bias": ("model.layers.{layer}.mlp.down_proj.bias",),
}
"""Parameter (see ``params.declare``) to the checkpoint's tensors that it is packed from, in order."""


@dataclass(frozen=True)
class Family:
    """One architecture: how its ``config.json`` sets the decoder's switches, and what its tensors are called."""

    architecture: str
    switches: Callable[[Mapping[str, Any]], dict[str, bool]]
    """``config.json`` to the ``ModelConfig`` switches (qkv_bias, o_bias, mlp_bias, qk_norm) that are not off."""
    names: Mapping[str, tuple[str, ...]]
    head_dim: int | None = None
    """The architecture's own default; None: hidden_size / num_attention_heads."""
    windowed: bool = False
    """Whether a ``sliding_window`` counts without ``use_sliding_window``: Qwen writes one and switches it off."""


def _attention_bias(raw: Mapping[str, Any]) -> dict[str, bool]:
    bias = bool(raw.get("attention_bias"))
    return {"qkv_bias": bias, "o_bias": bias}


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("Qwen2ForCausalLM", lambda _: {"qkv_bias": True}, LLAMA_NAMES),
        Family("Qwen3ForCausalLM", lambda raw: {**_attention_bias(raw), "qk_norm": True}, LLAMA_NAMES, head_dim=128),
        Family(
            "LlamaForCausalLM",
            lambda raw: {**_attention_bias(raw), "mlp_bias": bool(raw.get("mlp_bias"))},
            LLAMA_NAMES,
        ),
        Family("MistralForCausalLM", lambda _: {}, LLAMA_NAMES, windowed=True),
    )
}


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family that ``config.json`` names under ``architectures``; ``ModelError`` lists the known ones."""
    named = raw.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise ModelError(f"unknown architecture {named or '(none given)'}; known: {', '.join(sorted(FAMILIES))}")
