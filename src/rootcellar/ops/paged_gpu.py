"""Attention over pages as a Pallas kernel for GPUs, which Triton compiles.

A program has some queries of one KV head and a part of what they see. It reads positions by way of the page table, a
block at a time, and keeps an online softmax (FlashAttention: Dao et al., 2022; over pages: Kwon et al., 2023). Where
there are few queries the parts are many, so that all of the device reads, and XLA puts them together (Flash-Decoding:
Dao et al., 2023). No position is read that nobody sees: a window's queries begin at their window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from rootcellar.ops.reach import Reach

NAME = "rootcellar_paged_attention_gpu"
"""What the kernel is called in a compiled program."""
_MASKED = -1e30
"""The score of a position that is not seen."""
_LEAST = 16
"""A product's sides are at least so long, and powers of two."""
_BLOCK_ELEMENTS = 64 * 256
"""Most of the keys that are read at once; at most 64 positions."""
_EXACT = 8
"""How much less of both of float32, of which no tensor core makes exact products."""
_SUMS = 8192
"""Most elements of the sums that a program keeps in registers."""
_PROGRAMS = 4 * 132
"""Programs that keep a device busy: a few for each of its multiprocessors (132 of an H100 and H200)."""


def attend(
    reach: Reach, interpret: bool, where: tuple[int, int], q: Array, sinks: Array,
    tables: Array, rows: Array, positions: Array, pool: Array,
) -> Array:  # fmt: skip
    """What every query gets, float32 ``[tiles, kv_heads, queries, width]``.

    Args:
        reach: what they see.
        interpret: compute it as JAX does anywhere, for tests.
        where: in ``pool``, along its second axis, keys and values are.
        q: ``[tiles, kv_heads, queries, width]``, the queries of a token beside each other.
        sinks: float32 ``[kv_heads, queries]``; minus infinity for none.
        tables, rows, positions: see ``backends.backend.Attend``.
        pool: ``[pages, parts, kv_heads, page_size, width]``, a floating type.
    """
    tiles, kv_heads, queries, width = q.shape
    tile = len(positions) // tiles
    at = positions.reshape(tiles, tile)
    elements = (1 << (width - 1).bit_length()) * (_EXACT if pool.dtype == jnp.float32 else 1)
    most = max(_LEAST, _SUMS // elements)
    some = min(most, max(_LEAST, 1 << (queries - 1).bit_length()))
    cuts = -(-queries // some)
    q = jnp.pad(q.astype(pool.dtype), ((0, 0), (0, 0), (0, cuts * some - queries), (0, 0)))
    block = max(_LEAST, min(64, _BLOCK_ELEMENTS // elements))
    blocks = -(-tables.shape[1] * pool.shape[3] // block)
    shares = max(1, min(_PROGRAMS // (tiles * kv_heads * cuts), -(-blocks // 4)))
    whole = tiles * kv_heads * cuts
    of_program = pl.BlockSpec((None, some, width), lambda program, _: (program, 0, 0))
    sums = pl.BlockSpec((None, None, some, width), lambda program, share: (program, share, 0, 0))
    line = pl.BlockSpec((None, None, some), lambda program, share: (program, share, 0))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, reach, where, queries // tile, (kv_heads, cuts, shares), pool.shape[3], block),
        grid=(whole, shares),
        in_specs=[*[pl.BlockSpec()] * 4, of_program, pl.BlockSpec()],
        out_specs=[sums, line, line],
        out_shape=[shape((whole, shares, some, width)), *[shape((whole, shares, some))] * 2],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=NAME,
    )
    out, top, total = call(tables, rows, at[:, 0], jnp.max(at, axis=1), q.reshape(whole, some, width), pool)
    # The parts of each query, and its sink, which takes weight and gives nothing.
    sinks = jnp.maximum(jnp.pad(sinks, ((0, 0), (0, cuts * some - queries))), _MASKED).reshape(-1, some)
    sinks = jnp.tile(sinks, (tiles, 1))
    highest = jnp.maximum(jnp.max(top, axis=1), sinks)
    weights = jnp.exp(top - highest[:, None])
    total = jnp.sum(total * weights, axis=1) + jnp.where(sinks > _MASKED, jnp.exp(sinks - highest), 0.0)
    out = jnp.sum(out * weights[..., None], axis=1) / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(tiles, kv_heads, cuts * some, width)[:, :, :queries]


def cut(width: int) -> list[tuple[int, int]]:
    """Where the parts of a row of ``width`` begin and how long they are: powers of two, the longest first.

    ``width`` is a multiple of 16.
    """
    parts, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        parts.append((start, size))
        start += size
    return parts


def _kernel(  # type: ignore[no-untyped-def]
    reach: Reach, where: tuple[int, int], group: int, counts: tuple[int, int, int], page_size: int, block: int,
    tables, rows, starts, newests, q, pool, out, out_top, out_total,
) -> None:  # fmt: skip
    """Some queries' part in one share of what they see."""
    program, share = pl.program_id(0), pl.program_id(1)
    kv_heads, cuts, shares = counts
    some, width = q.shape
    tile, head = lax.div(program, kv_heads * cuts), lax.rem(lax.div(program, cuts), kv_heads)
    row, start, newest = rows[tile], starts[tile], newests[tile]
    first = reach.first(start)
    parts = cut(width)
    asked = start + lax.div(lax.rem(program, cuts) * some + lax.iota(jnp.int32, some), group)
    queries = [q[:, pl.ds(*part)] for part in parts]
    blocks = lax.div(jnp.maximum(newest - first + 1, 0) + block - 1, block)
    each = lax.div(blocks + shares - 1, shares)

    def body(i: Array, carry: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Array, Array, tuple[Array, ...]]:
        top, total, sums = carry
        at = first + i * block + lax.iota(jnp.int32, block)
        # What nobody has written for this row may be anything, and a weight of zero does not silence a NaN.
        there = at <= newest
        pages = plt.load(tables.at[row, lax.div(at, page_size)], mask=there, other=0)
        offsets = lax.rem(at, page_size)

        def read(which: int) -> list[Array]:
            found = []
            for begins, size in parts:
                shape = (block, size)
                page, offset, known = (lax.broadcast_in_dim(a, shape, (0,)) for a in (pages, offsets, there))
                lanes = begins + lax.broadcasted_iota(jnp.int32, shape, 1)
                found.append(plt.load(pool.at[page, which, head, offset, lanes], mask=known, other=0.0))
            return found

        keys = read(where[0])
        values = keys if where[0] == where[1] else read(where[1])
        scores = sum((_product(a, b.T) for a, b in zip(queries, keys, strict=True)), start=jnp.zeros((some, block)))
        seen = reach.sees(asked[:, None], at[None, :]) & there[None, :]
        scores = jnp.where(seen, reach.capped(scores * reach.scale), _MASKED)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new[:, None]), 0.0)
        keep = jnp.exp(top - new)
        total = total * keep + jnp.sum(weights, axis=1)
        more = [_product(weights.astype(value.dtype), value) for value in values]
        return new, total, tuple(a * keep[:, None] + b for a, b in zip(sums, more, strict=True))

    none = jnp.full(some, _MASKED, jnp.float32), jnp.zeros(some, jnp.float32)
    zeros = tuple(jnp.zeros((some, size), jnp.float32) for _, size in parts)
    begin = share * each
    top, total, sums = lax.fori_loop(begin, jnp.minimum(begin + each, blocks), body, (*none, zeros))
    out_top[...], out_total[...] = top, total
    for part, value in zip(parts, sums, strict=True):
        out[:, pl.ds(*part)] = value


def _product(a: Array, b: Array) -> Array:
    """A matrix product summed in float32; of float32 in full."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)
