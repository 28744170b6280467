"""What a family is, and what families have in common: reading fields, and the names most checkpoints use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rootcellar.cache.kind import Rule
from rootcellar.errors import ConfigError, ModelError
from rootcellar.models.feed_forward.activations import ACTIVATIONS
from rootcellar.models.rope import RopeConfig, read_rope
from rootcellar.plan.fields import Raw
from rootcellar.plan.layers import layer_rules

Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """One architecture.

    ``read``: from ``config.json`` the fields of ``ModelConfig`` that are the family's own, ``layers`` at least.
    ``names``: parameter (see ``params.declare``) to the checkpoint's tensors that it is packed from, in order;
    ``{layer}`` stands for the layer's index. ``defaults``: fields that ``config.json`` may leave out.
    """

    architecture: str
    read: Callable[[Raw], dict[str, Any]]
    names: Names
    defaults: Raw = field(default_factory=dict)


def layer_names(**suffixes: str | tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """A name table's rows for tensors of a layer: ``o="self_attn.o_proj.weight"``."""
    return {
        name: tuple(f"model.layers.{{layer}}.{x}" for x in ((given,) if isinstance(given, str) else given))
        for name, given in suffixes.items()
    }


TOP_NAMES: Names = {
    "embed": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
NORM_NAMES: Names = layer_names(
    attn_norm="input_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
)
ATTENTION_NAMES: Names = layer_names(
    qkv=tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    qkv_bias=tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    q_norm="self_attn.q_norm.weight",
    k_norm="self_attn.k_norm.weight",
    o="self_attn.o_proj.weight",
    o_bias="self_attn.o_proj.bias",
)
DENSE_NAMES: Names = layer_names(
    gate_up=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    gate_up_bias=("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    down="mlp.down_proj.weight",
    down_bias="mlp.down_proj.bias",
)


def within(prefix: str, names: Names) -> Names:
    """The names of a language model inside a multimodal one."""
    return {name: tuple(f"{prefix}.{source}" for source in sources) for name, sources in names.items()}


def need(raw: Raw, name: str) -> Any:
    """A field that must be there; ``ModelError`` names it when it is not."""
    if raw.get(name) is None:
        raise ModelError(f"the field {name!r} is missing")
    return raw[name]


def given(raw: Raw, name: str, default: Any) -> Any:
    """A field that may be absent or null."""
    value = raw.get(name)
    return default if value is None else value


def size(raw: Raw, name: str, default: int | None = None) -> int:
    """A field that is a whole number of at least 1; ``default`` where it may be absent or null."""
    value = int(need(raw, name) if default is None else given(raw, name, default))
    if value < 1:  # types and upper limits hold already: fields.check_fields
        raise ModelError(f"{name} must be a whole number of at least 1, not {value}")
    return value


def number(raw: Raw, name: str) -> float:
    """A field that is a number, and must be there."""
    return float(need(raw, name))


def heads_of(raw: Raw, head_dim: int | None = None) -> dict[str, int]:
    """``num_heads``, ``num_kv_heads`` and ``head_dim`` of ordinary attention.

    ``head_dim``: the architecture's own default; None: hidden_size / num_attention_heads.
    """
    heads = size(raw, "num_attention_heads")
    return {
        "num_heads": heads,
        "num_kv_heads": size(raw, "num_key_value_heads", heads),
        "head_dim": size(raw, "head_dim", head_dim or max(1, size(raw, "hidden_size") // heads)),
    }


def activation_of(raw: Raw, field: str = "hidden_act", default: str = "silu") -> str:
    """The name of the activation function; ``ModelError`` for one that is not known."""
    name = str(given(raw, field, default))
    if name not in ACTIVATIONS:
        raise ModelError(f"{field}={name!r} is not supported; known: {', '.join(map(repr, ACTIVATIONS))}")
    return name


def colours(seen: Raw, name: str) -> tuple[float, ...] | None:
    """A number for each colour, of ``preprocessor_config.json``; None where it is not given."""
    value = seen.get(name)
    if value is None:
        return None
    if len(value) != 3:
        raise ModelError(f"preprocessor_config.json: {name} must hold 3 numbers, one for each colour, not {len(value)}")
    return tuple(map(float, value))


def rules_of(raw: Raw, *known: Rule) -> list[tuple[Rule, int]]:
    """Rule and span of each layer, as the planner reads them; ``ModelError`` for rules that are not ``known``."""
    size(raw, "num_hidden_layers")
    try:
        rules = layer_rules(raw)
    except ConfigError as error:
        raise ModelError(str(error)) from None
    strange = sorted({rule for rule, _ in rules} - set(known))
    if strange:
        raise ModelError(
            f"layers of this architecture are {' or '.join(known)}, but the config makes some {strange[0]}"
        )
    return rules


def has_rope(raw: Raw) -> list[bool]:
    """Whether each layer has rotary embeddings: all but every fourth, unless ``no_rope_layers`` says it (1: it has)."""
    count = size(raw, "num_hidden_layers")
    listed = raw.get("no_rope_layers")
    if listed:
        if len(listed) < count:
            raise ModelError(f"no_rope_layers has {len(listed)} entries for {count} layers")
        return [bool(entry) for entry in listed[:count]]
    interval = size(raw, "no_rope_layer_interval")
    return [(index + 1) % interval != 0 for index in range(count)]


def rope_of_rule(raw: Raw, rule: Rule) -> RopeConfig:
    """``rope_parameters`` by kind of layer (transformers from 5 on), or scaling for full layers alone (before)."""
    sliding = rule == "sliding_window"
    fields = (raw.get("rope_parameters") or {}).get("sliding_attention" if sliding else "full_attention")
    if fields is None:
        fields = {} if sliding else dict(raw.get("rope_scaling") or {})
        local = raw.get("rope_local_base_freq") if sliding else None
        fields["rope_theta"] = local or raw.get("rope_theta")
    return read_rope({"rope_parameters": fields}, size(raw, "max_position_embeddings"))


def refuse(raw: Raw, *names: str) -> None:
    """Raise ``ModelError`` for fields that are set, and that this implementation would leave out of account."""
    for name in names:
        if raw.get(name):
            raise ModelError(f"{name}={raw[name]!r} is not supported")
