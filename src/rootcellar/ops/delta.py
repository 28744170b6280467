"""The gated delta rule (Yang, Kautz and Hatamizadeh, 2024, "Gated Delta Networks"), and its chunked form for tiles.

For one head with state ``S [K, V]``, key ``k`` and query ``q`` [K] of length one, value ``v [V]``, decay ``g <= 0`` (a
logarithm) and rate ``beta`` in 0 to 1::

    S  <-  exp(g) * S          S  <-  S + beta * k (v - S^T k)^T          y = S^T q / sqrt(K)

What a token writes depends on what the tokens before it in the tile wrote: a unit lower triangular system, solved for
all of the tile at once (the WY form, Yang et al., 2024, "Parallelizing Linear Transformers with the Delta Rule").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rootcellar.ops.recurrent import Course, StatesInPlace, column, each_row, tile_by_tile

_EPSILON = 1e-6  # under the root, when keys and queries are brought to length one


def gated_delta(
    pool: Array, q: Array, k: Array, v: Array, g: Array, beta: Array, way: Course, in_place: StatesInPlace | None = None
) -> tuple[Array, Array]:
    """Go through a packed batch.

    Args:
        pool: float32 [slots, H, K, V].
        q, k: [T, Q, K], of any length; head ``h`` uses query and key ``h // (H / Q)``.
        v: [T, H, V].
        g, beta: [T, H].
        way: the course of the batch.
        in_place: see :class:`StatesInPlace`.

    Returns:
        y float32 [T, H, V] (of no meaning for padding), and the pool.
    """
    n = way.count.shape[0]
    tokens, heads, width = v.shape
    tile = tokens // n
    size = k.shape[2]
    if tile == 1 and in_place is not None:
        told = jnp.stack([jnp.exp(g), beta], axis=-1)
        return in_place(head_step, pool, way, (told, unit(q) * size**-0.5, unit(k), v), width)
    real = (jnp.arange(tile)[None] < way.count[:, None])[:, None, :, None]

    def by_head(x: Array) -> Array:
        """[n, H, tile, ...] in float32, zeros in place of padding."""
        x = jnp.repeat(x.astype(jnp.float32).reshape(n, tile, x.shape[1], -1), heads // x.shape[1], axis=2)
        return jnp.where(real, x.transpose(0, 2, 1, 3), 0)

    q, k = by_head(unit(q)) * size**-0.5, by_head(unit(k))
    v, g, beta = by_head(v), by_head(g), by_head(beta)
    if tile == 1:

        def step(states: Array) -> tuple[Array, Array]:
            states = states * jnp.exp(g)
            change = (v[:, :, 0] - jnp.einsum("nhkv,nhk->nhv", states, k[:, :, 0])) * beta[:, :, 0]
            states = states + k[:, :, 0, :, None] * change[:, :, None]
            return states, jnp.einsum("nhkv,nhk->nhv", states, q[:, :, 0])

        return each_row(pool, way, step)

    total = jnp.cumsum(g, axis=2)  # log of the decay from the tile's start through each token
    order = jnp.tri(tile, dtype=bool)
    decay = jnp.exp(jnp.where(order, total - total.swapaxes(2, 3), -jnp.inf))  # [n, H, to, from]
    system = jnp.einsum("nhtk,nhsk->nhts", k * beta, k) * decay
    sides = jnp.concatenate([v * beta, k * beta * jnp.exp(total)], axis=3)
    solved = lax.platform_dependent(system, sides, cpu=_solved_by_products, default=_solved)
    written, seen = solved[..., :width], solved[..., width:]
    looked = jnp.einsum("nhtk,nhsk->nhts", q, k) * decay
    asking, keeping = q * jnp.exp(total), k * jnp.exp(total[:, :, -1:] - total)

    def one(t: Array, state: Array) -> tuple[Array, Array]:
        new = written[t] - seen[t] @ state
        y = asking[t] @ state + looked[t] @ new
        return state * jnp.exp(total[t, :, -1:]) + keeping[t].swapaxes(1, 2) @ new, y

    shape = jax.ShapeDtypeStruct((heads, tile, width), jnp.float32)
    y, pool = tile_by_tile(pool, way, shape, one)
    return y.transpose(0, 2, 1, 3).reshape(tokens, heads, width), pool


def _solved(system: Array, sides: Array) -> Array:
    """``x [..., T, N]`` of ``(1 + L) x = sides``; ``L``: what is below the diagonal of ``system [..., T, T]``."""
    return lax.linalg.triangular_solve(system, sides, left_side=True, lower=True, unit_diagonal=True)


def _solved_by_products(system: Array, sides: Array) -> Array:
    """The same by the inverse, from blocks that double: that of ``[[A, 0], [C, B]]`` has ``-inv(B) C inv(A)`` below.

    For CPUs, where JAX calls LAPACK, which waits for tasks of the very pool on whose thread it runs: for ever, once as
    many devices as there are cores do so at once (JAX 0.10.2).
    """
    at = jnp.arange(system.shape[-1])
    inverse = jnp.eye(len(at), dtype=system.dtype)
    for size in (1 << i for i in range((len(at) - 1).bit_length())):
        to, of = (at // size)[:, None], (at // size)[None]
        below = jnp.where((to % 2 == 1) & (of == to - 1), system, 0)
        inverse = inverse - (below if size == 1 else inverse @ below @ inverse)
    return inverse @ sides


def head_step(state: Array, told: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """One token of one head, whose decay and rate are ``told [1, 2]``; the others are rows ``[1, ...]``."""
    q, k = column(q), column(k)
    state = state * told[:, :1]
    change = (v - jnp.sum(state * k, axis=0, keepdims=True)) * told[:, 1:]
    state = state + k * change
    return state, jnp.sum(state * q, axis=0, keepdims=True)


def unit(x: Array) -> Array:
    """``x`` [..., K] brought to length one, in float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPSILON)


def gated_delta_sequential(state: Array, q: Array, k: Array, v: Array, g: Array, beta: Array) -> tuple[Array, Array]:
    """The rule as it is defined, one token of one sequence after another: slow and obvious.

    ``state [H, K, V]``, ``q`` and ``k`` ``[T, Q, K]``, ``v [T, H, V]``, ``g`` and ``beta`` ``[T, H]``; returns
    ``(y [T, H, V], state)``.
    """
    per = v.shape[1] // k.shape[1]

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, beta = token
        q, k = (jnp.repeat(unit(x), per, axis=0) for x in (q, k))
        state = state * jnp.exp(g)[:, None, None]
        change = (v - jnp.einsum("hkv,hk->hv", state, k)) * beta[:, None]
        state = state + k[:, :, None] * change[:, None, :]
        return state, jnp.einsum("hkv,hk->hv", state, q) * k.shape[-1] ** -0.5

    state, y = lax.scan(step, state, (q, k, v, g, beta))
    return y, state
