"""Recurrent states through a decode step where they lie, by a kernel in C++ for CPUs.

What XLA for CPUs makes of such a step gathers the states into memory that is new in every step (whose pages the system
hands out one by one), reads and writes them there several times, and scatters them. The kernel reads each once and
writes it once.
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
    built()
    told = [each.astype(jnp.float32) for each in operands]
    call = jax.ffi.ffi_call(
        "rootcellar_states",
        (
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
            jax.ShapeDtypeStruct((way.count.shape[0], pool.shape[1], width), jnp.float32),
        ),
        input_output_aliases={5 + len(told): 0},
    )
    where = way.source, way.target, way.fresh, way.offset, way.count
    pool, y = call(*where, *told, pool, rule=_RULES[head], vectors=vectors())
    return y, pool
