"""Rotary position embeddings: the frequencies of every scaling rule, and the turning itself.

Rules and their field names follow transformers' ``modeling_rope_utils``; the sources of the methods are named at each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rootcellar.errors import ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
AXES = 3
"""Of a place in a picture: time, height and width."""


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding. Fields that a rule does not use are left at their defaults.

    ``original_max`` is the context in tokens that the model was trained with before scaling.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn)."""
    interleaved: bool = False
    """The pairs are neighbours (0, 1), (2, 3) ...; otherwise the halves: (0, D / 2), (1, D / 2 + 1) ..."""
    factors: tuple[float, ...] = ()
    """Divides the frequency of each pair (longrope)."""
    part: float = 1.0
    """Of each head the leading part that is turned; the rest is left as it is."""
    turning: float = 1.0
    """Of the pairs of a whole head those that turn, the quickest (Gemma 4's "proportional"); the others stand still."""
    sections: tuple[int, ...] = ()
    """Pairs that turn by a token's place in time, in height and in width, in this order (Qwen2-VL's "mrope"); none: all
    turn by its position."""
    alternate: bool = False
    """The ``sections`` take turns from pair to pair, and time has what is left (Qwen3-VL)."""

    @property
    def axes(self) -> npt.NDArray[np.int64]:
        """By which of three axes each pair turns: int64 [pairs]."""
        if not self.alternate:
            return np.repeat(np.arange(len(self.sections)), self.sections)
        pair = np.arange(sum(self.sections))
        return np.where(pair < 3 * np.array(self.sections)[pair % 3], pair % 3, 0)


def read_rope(raw: Mapping[str, Any], context: int) -> RopeConfig:
    """The rotary embedding of a ``config.json``; ``context`` is its ``max_position_embeddings``.

    Reads ``rope_parameters`` (transformers from 5 on) or ``rope_theta`` with ``rope_scaling`` (before). Raises
    ``ModelError`` for a rule that is not in ``ROPE_TYPES``, a missing field, and a scaled rotation of a part of a head.
    """
    fields = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(fields.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    rule = fields.get("rope_type") or fields.get("type") or "default"
    rule = "longrope" if rule == "su" else rule  # as Phi 3 called it at first
    sections = tuple(fields.get("mrope_section") or ())
    alternate = bool(fields.get("mrope_interleaved"))
    rule = "default" if rule == "mrope" else rule  # as it was called before transformers 5
    if rule not in ROPE_TYPES:
        raise ModelError(f"rope scaling {rule!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    part = float(fields.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)
    if rule == "default":
        return RopeConfig(theta=theta, part=part, sections=sections, alternate=alternate)
    if sections:
        raise ModelError(f"mrope_section={list(sections)} with rope scaling {rule!r} is not supported")
    if rule == "proportional":
        factor = float(fields.get("factor") or 1.0)
        return RopeConfig(theta=theta, type=rule, factor=factor, original_max=context, turning=part)
    if rule == "longrope":
        return _read_longrope(raw, fields, context, RopeConfig(theta=theta, type=rule, part=part))
    if part != 1:
        raise ModelError(f"partial_rotary_factor={part} with rope scaling {rule!r} is not supported")
    # transformers lets the field next to the rope's own win, and defaults both to the context.
    original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings") or context
    factor = fields.get("factor")
    if factor is None and rule == "yarn":
        factor = context / original
    if factor is None:
        raise ModelError(f"rope scaling {rule!r} needs the field 'factor'")
    factor = float(factor)
    common: dict[str, Any] = {"theta": theta, "type": rule, "factor": factor, "original_max": int(original)}
    if rule == "dynamic":
        common["original_max"] = context
    if rule == "llama3":
        missing = [name for name in ("low_freq_factor", "high_freq_factor") if fields.get(name) is None]
        if missing:
            raise ModelError(f"rope scaling 'llama3' needs the fields {missing}")
        common["low_freq_factor"] = float(fields["low_freq_factor"])
        common["high_freq_factor"] = float(fields["high_freq_factor"])
        if common["high_freq_factor"] <= common["low_freq_factor"]:
            raise ModelError(
                f"rope scaling 'llama3' needs high_freq_factor={common['high_freq_factor']} to be above "
                f"low_freq_factor={common['low_freq_factor']}"
            )
    if rule == "yarn":
        common["beta_fast"] = float(fields.get("beta_fast") or 32)
        common["beta_slow"] = float(fields.get("beta_slow") or 1)
        common["truncate"] = bool(fields.get("truncate", True))
        common["attention_factor"] = _yarn_attention_factor(fields, factor)
    return RopeConfig(**common)


def _read_longrope(raw: Mapping[str, Any], fields: Mapping[str, Any], context: int, rope: RopeConfig) -> RopeConfig:
    """LongRoPE (Ding et al. 2024): a factor for each pair, one set for long sequences and one for short ones.

    transformers takes the set by the length that a sequence has reached, and computes all of its keys anew when it
    passes the original context. A cached key may not depend on what follows it, so here the set is the model's: the
    long one where ``max_position_embeddings`` is above the original context, as vLLM chooses by ``max_model_len``.
    """
    original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings") or context
    if original < 2:
        raise ModelError(f"original_max_position_embeddings={original} with rope scaling 'longrope': give at least 2")
    name = "long_factor" if context > original else "short_factor"
    if not fields.get(name):
        raise ModelError(f"rope scaling 'longrope' needs the field {name!r}")
    stretch = context / original if raw.get("original_max_position_embeddings") else fields.get("factor") or 1.0
    sharper = fields.get("attention_factor")
    if sharper is None:
        sharper = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    factors = tuple(float(factor) for factor in fields[name])
    return replace(rope, original_max=int(original), attention_factor=float(sharper), factors=factors)


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature, or DeepSeek's two-part form when both mscales are given."""
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return yarn_mscale(factor, float(fields["mscale"])) / yarn_mscale(factor, float(fields["mscale_all_dim"]))
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """How much sharper attention becomes where a context is stretched by ``factor`` (Peng et al. 2023, eq. 15)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> npt.NDArray[np.float32]:
    """Radians per position of each pair, float32 ``[head_dim / 2]`` (for ``dynamic``: within the original context).

    Computed in float64 and rounded once, which is what XLA makes of the formula in the compiled steps of trainers in
    JAX, to the bit. (torch rounds each power and its inverse: a third of its frequencies are one unit beside.)
    """
    plain = 1.0 / rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    if rope.type in ("linear", "proportional"):
        plain = plain / rope.factor
        plain[int(rope.turning * head_dim // 2) :] = 0
    elif rope.type == "longrope":
        plain = plain / np.asarray(rope.factors)
    elif rope.type == "llama3":
        plain = _llama3(rope, plain)
    elif rope.type == "yarn":
        plain = _yarn(rope, plain, head_dim)
    return plain.astype(np.float32)


def _llama3(rope: RopeConfig, plain: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Llama 3.1's rule: slow pairs are scaled, fast pairs kept, and those between are blended."""
    turns = rope.original_max * plain / (2 * math.pi)  # turns of each pair over the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return np.asarray((1 - blend) * plain / rope.factor + blend * plain)


def _yarn(rope: RopeConfig, plain: npt.NDArray[np.float64], head_dim: int) -> npt.NDArray[np.float64]:
    """YaRN (Peng et al. 2023): interpolate pairs that turn less than beta_slow times, keep those above beta_fast."""

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(rope.original_max / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)  # the paper's ramp must not divide by zero
    interpolated = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return np.asarray(plain / rope.factor * interpolated + plain * (1 - interpolated))


def rotations(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 ``[T, head_dim / 2]``, of int32 positions ``[T]``, or ``[axes, T]`` (``sections``)."""
    at = positions.astype(jnp.float32)
    at = at[rope.axes].T if at.ndim == 2 else at[:, None]
    if rope.type == "dynamic":
        frequencies = _dynamic(rope, head_dim, at)
    else:
        frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))
    angles = at * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def _dynamic(rope: RopeConfig, head_dim: int, at: jax.Array) -> jax.Array:
    """Dynamic NTK scaling, float32 ``[T, head_dim / 2]`` for positions ``[T, 1]``.

    The rule makes the base a function of the sequence's length so far. A cached key may not depend on what follows
    it, so here position ``p`` always turns with the base of length ``p + 1``: the same as transformers for every
    position within the original context and for every token generated beyond it. Only a *prompt* longer than the
    original context differs, which transformers turns with the base of its full length.
    """
    length = jnp.maximum(at + 1, rope.original_max)
    stretch = rope.factor * length / rope.original_max - (rope.factor - 1)
    base = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def check_turned(rope: RopeConfig, head_dim: int, name: str) -> None:
    """Raise ``ModelError`` unless whole pairs of a head of ``head_dim`` elements (the field ``name``) are turned."""
    turned = int(head_dim * rope.part)
    if turned < 2 or turned % 2:
        part = "" if rope.part == 1 else f", of which partial_rotary_factor={rope.part} turns {turned}"
        raise ModelError(f"{name}={head_dim}{part}: rotary embeddings turn pairs, so it must be even and at least 2")
    if rope.type == "longrope" and len(rope.factors) != turned // 2:
        raise ModelError(f"rope scaling 'longrope' has {len(rope.factors)} factors, and {turned // 2} pairs are turned")
    if rope.sections and (len(rope.sections) != AXES or sum(rope.sections) != turned // 2):
        raise ModelError(
            f"mrope_section={list(rope.sections)} is not supported: it must be three numbers of pairs that are "
            f"{turned // 2} together"
        )
    if rope.type == "dynamic" and head_dim == 2:
        raise ModelError(f"{name}=2 with rope scaling 'dynamic': its base is not defined for a single pair")


def turn(rope: RopeConfig, positions: jax.Array, *parts: jax.Array) -> tuple[jax.Array, ...]:
    """Each of ``parts`` ``[T, heads, D]`` turned by ``positions`` int32 ``[T]``, or ``[axes, T]`` (``sections``)."""
    turned = int(parts[0].shape[-1] * rope.part)
    cos, sin = rotations(rope, turned, positions)
    if rope.part == 1:
        return tuple(rotate(part, cos, sin, rope.interleaved) for part in parts)
    return tuple(
        jnp.concatenate([rotate(part[..., :turned], cos, sin, rope.interleaved), part[..., turned:]], axis=-1)
        for part in parts
    )


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Turn ``x`` ``[T, heads, D]`` by cos and sin ``[T, D / 2]``; float32 inside.

    The pairs are the halves, or, ``interleaved``, neighbours. Written over an axis of two, because XLA for CPUs then
    computes in vectors, and element by element where two halves are put together (16 rows: four times as long).
    """
    axis = -1 if interleaved else -2
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *((-1, 2) if interleaved else (2, -1)))
    signed = jnp.stack([-sin, sin], axis=axis)[:, None]
    turned = pairs * jnp.expand_dims(cos, axis)[:, None] + jnp.flip(pairs, axis) * signed
    return turned.reshape(x.shape).astype(x.dtype)
