"""Mamba-2's state space (Dao and Gu, 2024, "Transformers are SSMs"): the recurrence, and its chunked form for tiles.

For one head with state ``S [P, N]``, input ``x [P]``, step ``dt``, decay rate ``a < 0`` and vectors ``b``, ``c`` [N]::

    S  <-  exp(dt * a) * S  +  dt * x b^T          y = S c

Heads share ``b`` and ``c`` by group. Within a tile the recurrence is a masked product, as in attention, whose weights
decay; only the tile's own share passes from tile to tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.ops.recurrent import Course, StatesInPlace, column, each_row, tile_by_tile


def ssd(
    pool: Array, x: Array, dt: Array, a: Array, b: Array, c: Array, way: Course, in_place: StatesInPlace | None = None
) -> tuple[Array, Array]:
    """Go through a packed batch.

    Args:
        pool: float32 [slots, H, P, N].
        x: [T, H, P].
        dt: [T, H], positive; what padding has counts for nothing.
        a: [H], negative.
        b, c: [T, G, N]; head ``h`` uses group ``h // (H / G)``.
        way: the course of the batch.
        in_place: see :class:`StatesInPlace`.

    Returns:
        y float32 [T, H, P] (of no meaning for padding), and the pool.
    """
    n = way.count.shape[0]
    tokens, heads, width = x.shape
    groups, size = b.shape[1:]
    tile = tokens // n
    per = heads // groups
    wide = [v.astype(jnp.float32) for v in (x, dt, b, c)]
    if tile == 1 and in_place is not None:
        x, dt, b, c = wide
        told = jnp.exp(dt * a.astype(jnp.float32))[..., None]
        return in_place(head_step, pool, way, (told, x * dt[..., None], b, c), width)
    real = (jnp.arange(tile)[None] < way.count[:, None])[:, :, None, None]
    x = jnp.where(real, wide[0].reshape(n, tile, heads, width), 0).reshape(n, tile, groups, per, width)
    dt = jnp.where(real, wide[1].reshape(n, tile, groups, per), 0)
    b, c = (jnp.where(real, v.reshape(n, tile, groups, size), 0) for v in wide[2:])
    fall = dt * a.astype(jnp.float32).reshape(groups, per)
    x = x * dt[..., None]
    if tile == 1:

        def step(states: Array) -> tuple[Array, Array]:
            states = states.reshape(n, groups, per, width, size)
            states = states * jnp.exp(fall[:, 0])[..., None, None] + x[:, 0, ..., None] * b[:, 0, :, None, None]
            y = jnp.einsum("ngrpk,ngk->ngrp", states, c[:, 0])
            return states.reshape(n, heads, width, size), y

        y, pool = each_row(pool, way, step)
        return y.reshape(tokens, heads, width), pool

    total = jnp.cumsum(fall, axis=1)  # log of the decay from the tile's start through each token
    order = jnp.tri(tile, dtype=bool)[None, :, :, None, None]
    decay = jnp.exp(jnp.where(order, total[:, :, None] - total[:, None], -jnp.inf))  # [n, to, from, G, r]
    inside = jnp.einsum("ntgk,nsgk,ntsgr,nsgrp->ntgrp", c, b, decay, x, optimize="optimal")
    left = jnp.exp(total[:, -1:] - total)  # the decay from each token to the tile's end
    gone = jnp.exp(total)

    def one(t: Array, state: Array) -> tuple[Array, Array]:
        state = state.reshape(groups, per, width, size)
        y = jnp.einsum("tgk,grpk,tgr->tgrp", c[t], state, gone[t])
        new = state * gone[t, -1][..., None, None] + jnp.einsum("tgrp,tgr,tgk->grpk", x[t], left[t], b[t])
        return new.reshape(heads, width, size), y

    shape = jax.ShapeDtypeStruct((tile, groups, per, width), jnp.float32)
    passed, pool = tile_by_tile(pool, way, shape, one)
    return (inside + passed).reshape(tokens, heads, width), pool


def head_step(state: Array, told: Array, x: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """One token of one head, whose decay is ``told [1, 1]``; the others are rows ``[1, ...]``, ``x`` times its step."""
    state = state * told + column(x) * b
    return state, column(jnp.sum(state * c, axis=1, keepdims=True))


def ssd_sequential(state: Array, x: Array, dt: Array, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """The recurrence as it is defined, one token of one sequence after another: slow and obvious.

    ``state [H, P, N]``, ``x [T, H, P]``, ``dt [T, H]``, ``a [H]``, ``b`` and ``c`` ``[T, G, N]``; returns
    ``(y [T, H, P], state)``.
    """
    per = x.shape[1] // b.shape[1]

    def step(state: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        x, dt, b, c = token
        b, c = jnp.repeat(b, per, axis=0), jnp.repeat(c, per, axis=0)
        state = state * jnp.exp(dt * a)[:, None, None] + dt[:, None, None] * x[:, :, None] * b[:, None, :]
        return state, jnp.einsum("hpn,hn->hp", state, c)

    state, y = jax.lax.scan(step, state, (x, dt, b, c))
    return y, state
