"""How recurrent layers go through a packed batch: states read and written by slot, and the causal convolution.

A pool holds one state in each slot. A row of the batch reads the state in one slot (0: it begins from zeros) and leaves
its own in another; they are the same once a request has state of its own. Its tiles follow each other, so the first
tile reads what the row reads, every tile writes the row's own slot, and the next reads it there. Slot 0 takes what
padding writes, and is never read.

A batch of one token a tile (decoding) has at most one tile for each row: all of them go at once, or where their states
lie (``ops.states`` on CPUs, ``ops.slots`` on TPUs). Where a row reads the
slot that the row before it in the batch writes, it *follows* that one: its token comes after the other's (a guess that
is verified), and each leaves its state in a slot of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Course(NamedTuple):
    """What each of the ``n`` tiles of a packed batch does; see :func:`course`.

    Attributes:
        source: int32 [n], the slot whose state the tile starts from: where a row follows another, that one's target.
        fresh: bool [n], whether it starts from zeros instead.
        target: int32 [n], the slot that takes its state; 0 for padding.
        last: bool [n], whether it is its row's last tile.
        offset: int32 [n], tokens of its row, and of those that this one follows, that come before it in the batch.
        count: int32 [n], its tokens that are no padding.
    """

    source: Array
    fresh: Array
    target: Array
    last: Array
    offset: Array
    count: Array


def course(tables: Array, rows: Array, positions: Array) -> Course:
    """How the tiles of a packed batch follow each other.

    Args:
        tables: int32 [R, 2], the slot that each row reads (0: none) and the one that it writes; see above for those
            that follow each other.
        rows: int32 [n], the table row of each tile; tiles of one row are neighbours.
        positions: int32 [T], -1 for padding, which is last in a tile; ``T`` is a multiple of ``n``.
    """
    n = rows.shape[0]
    tile = positions.shape[0] // n
    count = jnp.sum(positions.reshape(n, tile) >= 0, axis=1, dtype=jnp.int32)
    used = count > 0
    index = jnp.arange(n, dtype=jnp.int32)
    read, own = tables[rows, 0], tables[rows, 1]
    changes = rows[1:] != rows[:-1]
    first = used & jnp.concatenate([jnp.ones(1, bool), changes | ~used[:-1]])
    last = used & jnp.concatenate([changes | ~used[1:], jnp.ones(1, bool)])
    follows = jnp.concatenate([jnp.zeros(1, bool), used[:-1] & changes & (own[:-1] != 0) & (read[1:] == own[:-1])])
    begin = lax.cummax(jnp.where(first & ~follows, index, 0))
    return Course(
        source=jnp.where(first, read, own),
        fresh=first & (read == 0),
        target=jnp.where(used, own, 0),
        last=last,
        offset=(index - begin) * tile,
        count=count,
    )


HeadStep = Callable[..., tuple[Array, Array]]
"""A token through the state of one head: ``(state, *rows) -> (state, y)``, all of them matrices, the rows ``[1, ...]``
and float32: what the head is told."""
StatesInPlace = Callable[[HeadStep, Array, Course, Sequence[Array], int], tuple[Array, Array]]
"""What takes the tokens of a decode step through their states where these lie: ``(head, pool, way,
operands [n, groups, ...], width of y) -> (y [n, H, width], pool)``. Head ``h`` is told the row of its group."""

ConvInPlace = Callable[[Array, Array, Array, Array, Course], tuple[Array, Array]]
"""The same for their convolution: ``(pool, x, weight, bias, way) -> (y float32, pool)``, as :func:`causal_conv`."""

Recurrence = Callable[[Array], tuple[Array, Array]]
TileRecurrence = Callable[[Array, Array], tuple[Array, Array]]


def column(row: Array) -> Array:
    """``[1, K]`` as ``[K, 1]``, or the other way round."""
    return jnp.transpose(row)


def each_row(pool: Array, way: Course, recur: Recurrence) -> tuple[Array, Array]:
    """Every tile at once, for batches in which no row has two: ``recur(states [n, ...]) -> (states, out [n, ...])``.

    Returns ``(out, pool)``.
    """
    states, out = recur(_gather(pool, way))
    return out, _scatter(pool, way.target, states)


def in_order(
    head: HeadStep,
    pool: Array,
    way: Course,
    operands: Sequence[Array],
    width: int,
    *,
    first: StatesInPlace | None = None,
) -> tuple[Array, Array]:
    """The tokens of a decode step of which some follow others: a :class:`StatesInPlace` for any kind of device.

    Those that follow none go at once, by ``first`` where there is one; the others are few, and go one by one.
    """
    follows = (way.offset > 0) & (way.count > 0)
    alone = way._replace(
        source=jnp.where(follows, 0, way.source),
        fresh=way.fresh | follows,
        target=jnp.where(follows, 0, way.target),
    )
    y, pool = (first or _at_once)(head, pool, alone, operands, width)
    order = jnp.argsort(~follows, stable=True)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        y, pool = carry
        t = order[i]
        state, out = _heads(head, _read(pool, way.source[t], way.fresh[t]), *(each[t] for each in operands))
        pool = lax.dynamic_update_index_in_dim(pool, state, way.target[t], 0)
        return lax.dynamic_update_index_in_dim(y, out, t, 0), pool

    return lax.fori_loop(0, jnp.sum(follows), body, (y, pool))


def _at_once(
    head: HeadStep,
    pool: Array,
    way: Course,
    operands: Sequence[Array],
    width: int,  # noqa: ARG001 - ``head`` knows it
) -> tuple[Array, Array]:
    return each_row(pool, way, lambda states: jax.vmap(lambda *row: _heads(head, *row))(states, *operands))


def _heads(head: HeadStep, state: Array, *told: Array) -> tuple[Array, Array]:
    """One token through the states ``[H, ...]`` of all heads, of which each is told its group's row of ``[G, ...]``."""
    rows = [jnp.repeat(each, len(state) // len(each), axis=0)[:, None] for each in told]
    state, y = jax.vmap(head)(state, *rows)
    return state, y[:, 0]


def tile_by_tile(pool: Array, way: Course, out: jax.ShapeDtypeStruct, recur: TileRecurrence) -> tuple[Array, Array]:
    """One tile after another: ``recur(tile, state) -> (state, out of the tile)``; ``out``: of one tile.

    Returns ``(out [n, ...], pool)``; the tiles of padding hold zeros.
    """
    n = way.count.shape[0]

    def body(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        pool, outs = carry
        state, result = recur(t, _read(pool, way.source[t], way.fresh[t]))
        pool = lax.dynamic_update_index_in_dim(pool, state.astype(pool.dtype), way.target[t], 0)
        return pool, lax.dynamic_update_index_in_dim(outs, result.astype(outs.dtype), t, 0)

    used = jnp.sum(way.count > 0)  # padding tiles come last
    pool, outs = lax.fori_loop(0, used, body, (pool, jnp.zeros((n, *out.shape), out.dtype)))
    return outs, pool


def causal_conv(
    pool: Array, x: Array, weight: Array, bias: Array | None, way: Course, in_place: ConvInPlace | None = None
) -> tuple[Array, Array]:
    """A depthwise causal convolution: each channel's last ``taps`` inputs, weighted.

    Args:
        pool: [slots, taps - 1, C], the inputs before each row's first token, the oldest first.
        x: [T, C].
        weight: [taps, C], the newest input's last.
        bias: [C] or None.
        way: the course of the batch.
        in_place: see :class:`ConvInPlace`.

    Returns:
        float32 [T, C] (of no meaning for padding) and the pool with each row's last ``taps - 1`` inputs.
    """
    n = way.count.shape[0]
    taps, channels = weight.shape
    tile = x.shape[0] // n
    if tile == 1 and in_place is not None:
        return in_place(pool, x, weight, jnp.zeros(channels) if bias is None else bias, way)
    tiles = x.reshape(n, tile, channels)
    before = taps - 1
    # The inputs before a tile: those of its row in this batch as far as they reach, and of the state before them.
    back = jnp.arange(before, dtype=jnp.int32)
    at = (jnp.arange(n, dtype=jnp.int32) * tile)[:, None] + back - before
    here = way.offset[:, None] + back >= before
    first = jnp.arange(n, dtype=jnp.int32) - way.offset // tile
    states = _gather(pool, way._replace(source=way.source[first], fresh=way.fresh[first]))
    older = jnp.take_along_axis(states, jnp.minimum(way.offset[:, None] + back, before - 1)[:, :, None], axis=1)
    previous = jnp.where(here[:, :, None], x[jnp.maximum(at, 0)], older.astype(x.dtype))
    window = jnp.concatenate([previous, tiles], axis=1)  # [n, before + tile, C]
    wide, taken = window.astype(jnp.float32), weight.astype(jnp.float32)
    out = sum(wide[:, m : m + tile] * taken[m] for m in range(taps))
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    newest = jnp.take_along_axis(window, (way.count[:, None] + back)[:, :, None], axis=1)
    pool = _scatter(pool, jnp.where(way.last, way.target, 0), newest)
    return out.reshape(n * tile, channels), pool


def causal_conv_sequential(x: Array, weight: Array, bias: Array | None) -> Array:
    """The convolution of one whole sequence ``x`` [T, C], as :func:`causal_conv` without a state: slow and obvious."""
    taps = weight.shape[0]
    padded = jnp.pad(x.astype(jnp.float32), ((taps - 1, 0), (0, 0)))
    windows = jnp.stack([padded[m : m + len(x)] for m in range(taps)], axis=1)  # [T, taps, C]
    out = jnp.einsum("tmc,mc->tc", windows, weight.astype(jnp.float32))
    return out if bias is None else out + bias.astype(jnp.float32)


def _gather(pool: Array, way: Course) -> Array:
    """The states ``[n, ...]`` that tiles start from; zeros for fresh ones, whatever slot 0 holds."""
    states = _read(pool, way.source, way.fresh.all())
    return jnp.where(way.fresh.reshape(-1, *[1] * (pool.ndim - 1)), 0, states)


def _read(pool: Array, slots: Array, none: Array) -> Array:
    """``pool[slots]``, or zeros when ``none``.

    The branch also keeps XLA from fusing the read into each of its users: one of them might then run after the pool is
    written in place, and the pool be copied for it in every step.
    """
    shape = jax.eval_shape(lambda: pool[slots])
    return lax.cond(none, lambda: jnp.zeros(shape.shape, shape.dtype), lambda: pool[slots])


def _scatter(pool: Array, slots: Array, states: Array) -> Array:
    """Write ``states`` [n, ...] into their slots, in place."""
    if slots.shape[0] == 1:
        # A scatter of one update becomes a dynamic-update-slice that XLA for CPUs copies into every consumer, the whole
        # pool with it. A second update, to the padding slot, keeps it a scatter in place.
        slots = jnp.pad(slots, (0, 1))
        states = jnp.pad(states, ((0, 1), *[(0, 0)] * (states.ndim - 1)))
    return pool.at[slots].set(states.astype(pool.dtype))
