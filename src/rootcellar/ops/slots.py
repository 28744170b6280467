"""Recurrent states through a decode step in one pass, as a Pallas kernel for TPUs.

XLA gathers a batch's states out of their pool, reads what it gathered once for each product, writes what becomes of it,
and scatters that: seven passes over the states where two must be. A program of this kernel's grid has the state of one
row: it is fetched from the slot that the row reads while the row before it is computed, and written into the row's own
slot while the next one is. No slot is read by one row and written by another (snapshots are pinned, and never written),
so that rows may go in any order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rootcellar.ops.recurrent import Course, HeadStep

NAME = "rootcellar_recurrent_states"
"""What the kernel is called in a compiled program."""
_TOGETHER = 4
"""Heads in a turn of its loop, where so many divide them: what one waits for another computes meanwhile."""
_VMEM = 48 << 20
"""Bytes of a core's memory that it may take: two states that come and two that go, of four megabytes each."""


def each_slot(
    head: HeadStep, pool: Array, way: Course, operands: Sequence[Array], width: int, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Every row's token through its state.

    Args:
        head: what happens to the state of a head; its ``y`` is ``[1, width]``.
        pool: float32 ``[slots, H, ...]``, of which a head's state is a matrix.
        way: the course of a batch whose tiles are one token.
        operands: float32 ``[n, G, ...]``, their groups a divisor of H each: what ``head`` is told.
        width: of ``y``.
        interpret: compute it as JAX does anywhere, for tests.

    Returns:
        float32 ``[n, H, width]`` (of no meaning for padding), and the pool.
    """
    n, (_, heads, *state) = way.count.shape[0], pool.shape

    def of_row(i: Array, *_: Any) -> tuple[Array, int, int]:
        return i, 0, 0

    def read(i: Array, source: Any, *_: Any) -> tuple[Array, int, int, int]:
        return source[i], 0, 0, 0

    def written(i: Array, _: Any, __: Any, target: Any) -> tuple[Array, int, int, int]:
        return target[i], 0, 0, 0

    whole = (1, heads, *state)
    call = pl.pallas_call(
        functools.partial(_kernel, head, heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(n,),
            in_specs=[*(pl.BlockSpec((1, *o.shape[1:]), of_row) for o in operands), pl.BlockSpec(whole, read)],
            out_specs=[pl.BlockSpec((1, heads, width), of_row), pl.BlockSpec(whole, written)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((n, heads, width), jnp.float32),
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        ],
        input_output_aliases={3 + len(operands): 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM),
        cost_estimate=pl.CostEstimate(
            flops=6 * n * math.prod(whole), transcendentals=0, bytes_accessed=moved_bytes(pool.shape, n)
        ),
        interpret=interpret,
        name=NAME,
    )
    y, pool = call(way.source, way.fresh.astype(jnp.int32), way.target, *operands, pool)
    return y, pool


def moved_bytes(pool: Sequence[int], rows: int) -> int:
    """Bytes of states that the kernel reads and writes, for a pool of this shape."""
    return 2 * 4 * rows * math.prod(pool[1:])


def _kernel(head: HeadStep, heads: int, source: Any, fresh: Any, target: Any, *refs: Any) -> None:  # noqa: ARG001
    """One row."""
    *operands, held, out, kept = refs
    together = math.gcd(heads, _TOGETHER)
    empty = fresh[pl.program_id(0)] != 0

    def one(h: Array) -> None:
        rows = [o[0, pl.ds(lax.div(h, heads // o.shape[1]), 1)] for o in operands]
        state = jnp.where(empty, 0.0, held[0, h])
        kept[0, h], out[0, pl.ds(h, 1)] = head(state, *rows)

    def turn(i: Array, _: None) -> None:
        for j in range(together):
            one(i * together + j)

    lax.fori_loop(0, heads // together, turn, None)
