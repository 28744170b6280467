"""Recurrent layers' decode steps over their states where these lie, by kernels in C++ for CPUs.

What XLA for CPUs makes of such a step gathers the states into memory that is new in every step (whose pages the system
hands out one by one), reads and writes them there several times, and scatters them. The kernels read each once and
write it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.ops import delta, ssd
from rootcellar.ops.kernels import built, vectors
from rootcellar.ops.recurrent import Course, HeadStep

_RULES: Mapping[HeadStep, str] = {delta.head_step: "delta", ssd.head_step: "ssd"}
"""What the kernel calls that which happens to a head's state."""


def in_states(head: HeadStep, pool: Array, way: Course, operands: Sequence[Array], width: int) -> tuple[Array, Array]:
    """A ``StatesInPlace`` (``ops.recurrent``), also where rows follow others.

    Args:
        head: :func:`delta.head_step` or :func:`ssd.head_step`.
        pool: float32 ``[slots, H, ...]``; donate it to the step.
        way: the course of a batch whose tiles are one token.
        operands: ``[n, G, ...]``, their groups a divisor of H each: what ``head`` is told.
        width: of ``y``.

    Returns:
        float32 ``[n, H, width]`` (zeros for padding), and the pool.
    """
    shape = way.count.shape[0], pool.shape[1], width
    return _call("rootcellar_states", pool, way, operands, shape, rule=_RULES[head])


def conv_in_states(pool: Array, x: Array, weight: Array, bias: Array, way: Course) -> tuple[Array, Array]:
    """:func:`recurrent.causal_conv` of one token a tile, also where rows follow others; zeros for padding.

    ``pool``: float32 or bfloat16; donate it to the step.
    """
    return _call("rootcellar_convolution", pool, way, (x, weight, bias), x.shape)


def _call(
    target: str, pool: Array, way: Course, told: Sequence[Array], shape: Sequence[int], **options: str
) -> tuple[Array, Array]:
    """``(y float32 of this shape, pool)`` of a kernel, which is told so much in float32."""
    built()
    arrays = way.source, way.target, way.fresh, way.offset, way.count, *(each.astype(jnp.float32) for each in told)
    call = jax.ffi.ffi_call(
        target,
        (jax.ShapeDtypeStruct(pool.shape, pool.dtype), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)),
        input_output_aliases={len(arrays): 0},
    )
    pool, y = call(*arrays, pool, vectors=vectors(), **options)
    return y, pool
