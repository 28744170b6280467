"""Attention over pages as a Pallas kernel for TPUs.

A program of the grid has one tile's queries, all heads. It fetches the pages that they see from the pool, a block at a
time into one of two buffers, the next block (or the first one of the next tile) while it computes with this one, and
keeps an online softmax (FlashAttention: Dao et al., 2022; over pages: Kwon et al., 2023). Each page is read once for
all heads, and no page that nobody sees: a window's tile begins at its window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rootcellar.ops.reach import Reach

NAME = "rootcellar_paged_attention"
"""What the kernel is called in a compiled program."""
_LANES = 128
_MASKED = -1e30
"""The score of a position that is not seen."""
_BLOCK_TOKENS = 512
_BLOCK_BYTES = 2 << 20
_SCORE_BYTES = 2 << 20
"""Most of a block: positions, bytes that are fetched, and bytes of its scores for one head."""
_VMEM = 64 << 20
"""Of the 64 or 128 MiB of a core (v4 to v6e) the kernel may take so much; XLA gives it 16 where nothing is said."""


def attend(
    reach: Reach, interpret: bool, lanes: tuple[int, int, int], q: Array, sinks: Array,
    tables: Array, rows: Array, positions: Array, pool: Array,
) -> Array:  # fmt: skip
    """What every query gets, float32 ``[tiles, kv_heads, queries, width]``.

    Args:
        reach: what they see.
        interpret: compute it as JAX does anywhere, for tests.
        lanes: of a row of the pool where a key begins, where a value begins, and how wide the two are.
        q: ``[tiles, kv_heads, queries, width]``, the queries of a token beside each other.
        sinks: float32 ``[kv_heads, queries]``; minus infinity for none.
        tables, rows, positions: see ``backends.backend.Attend``.
        pool: ``[pages, kv_heads, page_size, row]``, float32 or bfloat16.
    """
    tiles, kv_heads, queries, width = q.shape
    _, _, page_size, row = pool.shape
    tile = len(positions) // tiles
    more = -queries % (32 // pool.dtype.itemsize)  # whole tiles of queries
    q = jnp.pad(q.astype(pool.dtype), ((0, 0), (0, 0), (0, more), (0, 0)))
    sinks = jnp.pad(sinks, ((0, 0), (0, more)))[..., None]
    at = positions.reshape(tiles, tile)
    newest, start = jnp.max(at, axis=1), at[:, 0]
    first = reach.first(start) // page_size
    page_bytes = kv_heads * page_size * row * pool.dtype.itemsize
    per_block = block_pages(page_bytes, page_size, queries + more)
    cores = 2 if tiles % 2 == 0 else 1  # v4 and v5p have two, which share the tiles
    each, most = tiles // cores, tables.shape[1] * tiles

    def of_tile(core: Array, i: Array, *_: Any) -> tuple[Array, int, int, int]:
        return core * each + i, 0, 0, 0

    one = (1, kv_heads, queries + more, width)
    kept = pltpu.VMEM((*one[1:3], _LANES), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, reach, lanes, queries // tile, each),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, each),
            in_specs=[
                pl.BlockSpec(one, of_tile),
                pl.BlockSpec((*one[1:3], 1), lambda *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(one, of_tile),
            scratch_shapes=[
                pltpu.VMEM((2, per_block, kv_heads, page_size, row), pool.dtype),
                pltpu.SMEM((2, 1, tables.shape[1]), jnp.int32),
                pltpu.SMEM((1,), jnp.int32),
                kept,
                kept,
                pltpu.VMEM(one[1:], jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tiles, *one[1:]), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        # What no batch exceeds: XLA plans by it, and knows no lengths.
        cost_estimate=pl.CostEstimate(
            flops=4 * most * page_size * kv_heads * queries * width,
            transcendentals=most * page_size * kv_heads * queries,
            bytes_accessed=most * page_bytes,
        ),
        interpret=interpret,
        name=NAME,
    )
    out: Array = call(rows, first, start, newest, q, sinks, tables[:, None], pool)
    return out[:, :, :queries]


def block_pages(page_bytes: int, page_size: int, queries: int) -> int:
    """Pages in a block for so many queries of a head."""
    tokens = min(_BLOCK_TOKENS, _SCORE_BYTES // (4 * queries), _BLOCK_BYTES * page_size // page_bytes)
    return max(1, tokens // page_size)


@dataclass(frozen=True)
class _Pages:
    """What fetches the pages of tiles: references to the kernel's scalars, tables, pool and buffers."""

    per_block: int
    page_size: int
    rows: Any
    first: Any
    newest: Any
    tables: Any
    pool: Any
    held: Any
    table: Any
    fetched: Any
    told: Any

    def count(self, tile: Array) -> Array:
        """Pages that a tile sees."""
        newest = self.newest[tile]
        return jnp.where(newest >= 0, lax.div(newest, self.page_size) - self.first[tile] + 1, 0)

    def blocks(self, tile: Array) -> Array:
        """At least one, where nothing is to be fetched: what comes after a tile of padding is fetched in it."""
        return jnp.maximum(lax.div(self.count(tile) + self.per_block - 1, self.per_block), 1)

    def row(self, tile: Array) -> Any:
        """The copy of a tile's row of the page table."""
        return pltpu.make_async_copy(self.tables.at[self.rows[tile]], self.table.at[tile & 1], self.told.at[tile & 1])

    def each(self, tile: Array, block: Array | int, slot: Array | int, act: Callable[[Any], None]) -> None:
        """``act`` on the copy of each page of a tile's block."""

        def one(j: Array, _: None) -> None:
            page = self.table[tile & 1, 0, self.first[tile] + block * self.per_block + j]
            act(pltpu.make_async_copy(self.pool.at[page], self.held.at[slot, j], self.fetched.at[slot]))

        lax.fori_loop(0, jnp.minimum(self.count(tile) - block * self.per_block, self.per_block), one, None)


def _kernel(  # type: ignore[no-untyped-def]
    reach: Reach, lanes: tuple[int, int, int], group: int, each: int,
    rows, first, start, newest, q, sinks, tables, pool, out, held, table, turn, top, total, summed, fetched, told,
) -> None:  # fmt: skip
    """One tile. ``held``: two blocks of pages; ``table``: two rows of the page table, of this tile and the next.

    ``turn``: which of the blocks is this tile's first. It outlives the program, as what was fetched for the next does.
    """
    core, i = pl.program_id(0), pl.program_id(1)
    this = core * each + i
    _, per_block, kv_heads, page_size, row = held.shape
    block, queries = per_block * page_size, q.shape[2]
    pages = _Pages(per_block, page_size, rows, first, newest, tables, pool, held, table, fetched, told)

    @pl.when(i == 0)
    def _() -> None:
        turn[0] = 0
        pages.row(this).start()
        pages.row(this).wait()
        pages.each(this, 0, 0, _start)

    @pl.when(i + 1 < each)
    def _() -> None:
        pages.row(this + 1).start()

    top[...] = jnp.broadcast_to(jnp.maximum(sinks[...], _MASKED), top.shape)
    total[...] = jnp.broadcast_to(jnp.where(sinks[...] > _MASKED, 1.0, 0.0), total.shape)
    summed[...] = jnp.zeros_like(summed)
    mine, last = turn[0], pages.blocks(this) - 1
    asked = start[this] + lax.div(lax.broadcasted_iota(jnp.int32, (queries, block), 0), group)

    def body(number: Array, _: None) -> None:
        slot = (mine + number) & 1

        @pl.when(number < last)
        def _() -> None:
            pages.each(this, number + 1, 1 - slot, _start)

        @pl.when((number == last) & (i + 1 < each))
        def _() -> None:
            pages.row(this + 1).wait()
            pages.each(this + 1, 0, 1 - slot, _start)
            turn[0] = 1 - slot

        pages.each(this, number, slot, _wait)
        before = (first[this] + number * per_block) * page_size

        # What nobody has written for this row may be anything, and a weight of zero does not silence a NaN.
        @pl.when(number == last)
        def _() -> None:
            at = before + lax.broadcasted_iota(jnp.int32, (block, row), 0)
            for head in range(kv_heads):
                found = held[slot, :, head].reshape(block, row).astype(jnp.float32)
                kept = jnp.where(at <= newest[this], found, 0.0).astype(held.dtype)
                held[slot, :, head] = kept.reshape(per_block, page_size, row)

        at = before + lax.broadcasted_iota(jnp.int32, (queries, block), 1)
        seen = reach.sees(asked, at) & (at <= newest[this])
        for head in range(kv_heads):
            found = held[slot, :, head].reshape(block, row)
            of_head = (ref.at[head] for ref in (top, total, summed))
            _add(reach, lanes, q[0, head], found, seen, *of_head)

    lax.fori_loop(0, last + 1, body, None)
    for head in range(kv_heads):
        out[0, head] = summed[head] / jnp.maximum(total[head][:, :1], 1e-30)


def _add(  # type: ignore[no-untyped-def]
    reach: Reach, lanes: tuple[int, int, int], q: Array, found: Array, seen: Array, top, total, summed
) -> None:
    """A block's part in an online softmax, whose state lies in the last three."""
    key, value, width = lanes
    keys, values = found[:, key : key + width], found[:, value : value + width]
    product = functools.partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if found.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    scores = reach.capped(product(q, keys, (((1,), (1,)), ((), ()))) * reach.scale)
    scores = jnp.where(seen, scores, _MASKED)
    old = top[...][:, :1]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
    keep = jnp.exp(old - new)
    top[...] = jnp.broadcast_to(new, top.shape)
    total[...] = total[...] * keep + jnp.sum(weights, axis=1, keepdims=True)
    summed[...] = summed[...] * keep + product(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()
