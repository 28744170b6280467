"""Attention in plain JAX, for any device and every layout: it reads and writes pages as the layout does.

Blocks of pages are gathered in a loop whose length is the longest row's, so that one compiled step serves every context
length, with an online softmax (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from rootcellar.ops.backends.backend import Attend
from rootcellar.ops.pages import padded, places
from rootcellar.ops.reach import Reach
from rootcellar.plan.sizing import BLOCK_TOKENS
from rootcellar.pools import Layout
from rootcellar.pools.layouts import TokenLayout, tiled

# The score of a position that is not seen.
MASKED = -1e30
Sum = Callable[[Array], Array]


def prefers(layout: Layout, platform: str) -> Layout:
    """See ``Backend``: XLA for TPUs would bring pools that are no whole tiles into another order, and back."""
    return tiled(layout) if platform == "tpu" else layout


def lacks(layout: Layout, platform: str) -> str | None:  # noqa: ARG001 - it runs everywhere
    """See ``Backend``."""
    return None if layout.form in _BY_FORM else f"nothing attends over {layout.form}"


def attend(layout: TokenLayout, reach: Reach) -> Attend:
    """See ``Backend``."""
    function = functools.partial(_BY_FORM[layout.form], layout, reach)
    return function if layout.turn is None else functools.partial(_turned, function, layout.turn)


def _turned(attend: Attend, turn: NDArray[np.float32], q: Array, *rest: Array) -> tuple[Array, ...]:
    """Attention of queries that are turned as what is read was: scores are the same, and the sum turns back."""
    out, *buffers = attend(_by(q, turn), *rest)
    return _by(out, turn), *buffers


def _by(part: Array, turn: NDArray[np.float32]) -> Array:
    return jnp.matmul(part.astype(jnp.float32), turn, precision=lax.Precision.HIGHEST)


def write(
    layout: TokenLayout, buffers: Sequence[Array], parts: Sequence[Array], tables: Array, rows: Array, positions: Array
) -> tuple[Array, ...]:
    """The ``buffers`` of a layer with the ``parts`` of a packed batch in their pages; padding goes to page 0."""
    pages, offsets = places(tables, rows, positions, layout.page_size)
    return layout.write(buffers, pages, offsets, [padded(part, pages) for part in parts])


def _by_head(
    layout: TokenLayout, reach: Reach, q: Array, k: Array, v: Array, sinks: Array,
    tables: Array, rows: Array, positions: Array, *buffers: Array,
) -> tuple[Array, ...]:  # fmt: skip
    positions, until = positions if positions.ndim == 2 else (positions, positions)
    buffers = write(layout, buffers, (k, v), tables, rows, positions)
    kv_heads, head_dim = k.shape[1:]
    n, page_size = rows.shape[0], layout.page_size
    # Tiles, heads, the query heads of each, tokens of a tile.
    shape = (n, kv_heads, q.shape[1] // kv_heads, positions.shape[0] // n)
    q = q.reshape(n, shape[3], *shape[1:3], head_dim).astype(jnp.float32) * reach.scale

    def look(written: Array, keys: Array, values: Array) -> tuple[Array, Sum]:
        values = jnp.where(written.reshape(n, -1, 1, page_size, 1), values, 0.0)
        scores = jnp.einsum("nthgd,nbhpd->nhgtbp", q, keys).reshape(*shape, -1)
        return scores, lambda p: jnp.einsum("nhgtbp,nbhpd->nhgtd", p.reshape(*shape, -1, page_size), values)

    sinks = jnp.broadcast_to(sinks.reshape(*shape[1:3], 1), shape)
    start = (jnp.maximum(sinks, MASKED), jnp.where(sinks > MASKED, 1.0, 0.0), jnp.zeros((*shape, head_dim)))
    spread = functools.partial(jnp.expand_dims, axis=(1, 2))
    out = _softmax(layout, reach, buffers, tables, rows, positions, look, start, spread, until)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape[0] * q.shape[1], -1, head_dim), *buffers


def _over_latents(
    layout: TokenLayout, reach: Reach, q: Array, latents: Array,
    tables: Array, rows: Array, positions: Array, *buffers: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """Attention over latents, which all heads share (multi-head latent attention: DeepSeek-V2, 2024).

    A *latent* is the compressed key and value of a token, then the part of the key that is turned by its position. Keys
    and values of a head are linear maps of the compressed part; *absorbed*, these maps are applied to the query and to
    the result instead, and attention is that of many query heads on one key head whose values are its keys. The pool is
    read once for all heads, and no key or value of a head ever exists.
    """
    buffers = write(layout, buffers, (latents,), tables, rows, positions)
    n, (heads, dim) = rows.shape[0], q.shape[1:]
    shape = (n, positions.shape[0] // n * heads)  # tiles, tokens of a tile by head
    q = q.astype(jnp.float32).reshape(*shape, dim) * reach.scale

    def look(written: Array, held: Array) -> tuple[Array, Sum]:
        held = jnp.where(written[:, :, None], held.reshape(n, -1, dim), 0.0)
        # The turned part is summed as well, for nothing: cutting it off the block would be a copy.
        return jnp.einsum("nqd,nsd->nqs", q, held), lambda p: jnp.einsum("nqs,nsd->nqd", p, held)

    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, dim)))
    spread = functools.partial(jnp.repeat, repeats=heads, axis=1)
    out = _softmax(layout, reach, buffers, tables, rows, positions, look, start, spread)
    return out.reshape(-1, heads, dim), *buffers


def _softmax(
    layout: TokenLayout, reach: Reach, buffers: Sequence[Array], tables: Array, rows: Array, positions: Array,
    look: Callable[..., tuple[Array, Sum]], start: tuple[Array, Array, Array], spread: Callable[[Array], Array],
    until: Array | None = None,
) -> Array:  # fmt: skip
    """What every query gets of all that it sees, a block of pages at a time.

    ``look(written [tiles, block], *parts)`` gives the scores of what ``layout.read`` gave, ``[..., block]``, and a
    function that sums its values by weights of that shape. ``start``: of all queries the greatest score so far, the sum
    of weights, the sum of values. ``spread`` brings ``[tiles, tile, block]`` to the scores' axes. ``until``: the last
    position that each query sees, where it is not its own.
    """
    page_size, n = layout.page_size, rows.shape[0]
    per_block = max(1, BLOCK_TOKENS // page_size)
    block = per_block * page_size
    positions = positions.reshape(n, -1)
    until = positions if until is None else until.reshape(n, -1)
    newest = jnp.max(until, axis=1)
    # Each tile's blocks begin at the first page that its first token sees.
    first = reach.first(positions[:, 0]) // page_size
    pages_of = _block_of_pages(reach, tables, rows, first, per_block)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        at = first[:, None] * page_size + i * block + jnp.arange(block)  # [n, block]
        # Slots that nobody has written for this row hold what an earlier owner left, which may be anything: a weight of
        # zero does not silence a NaN.
        scores, sums = look(at <= newest[:, None], *layout.read(buffers, pages_of(i)))
        ahead = (at[:, None] > positions[:, :, None]) & (at[:, None] <= until[:, :, None])
        seen = spread(reach.sees(positions[:, :, None], at[:, None]) | ahead)
        scores = jnp.where(seen, reach.capped(scores), MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        return new_top, total * keep + jnp.sum(weights, axis=-1), out * keep[..., None] + sums(weights)

    blocks = (jnp.max(newest - first * page_size) + block) // block
    _, total, out = lax.fori_loop(0, blocks, body, start)
    return out / jnp.maximum(total, 1e-30)[..., None]


def _block_of_pages(reach: Reach, tables: Array, rows: Array, first: Array, per_block: int) -> Callable[[Array], Array]:
    """A function from a block's number to its pages, int32 [tiles, per_block], of each tile from ``first`` on."""
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % per_block)))[rows]
    if reach.rule == "full":  # every tile begins at 0: a slice is cheaper than a gather
        return lambda i: lax.dynamic_slice_in_dim(tables, i * per_block, per_block, axis=1)

    def pages_of(i: Array) -> Array:
        at = first[:, None] + i * per_block + jnp.arange(per_block)
        return jnp.take_along_axis(tables, at, axis=1, mode="fill", fill_value=0)

    return pages_of


_BY_FORM: Mapping[str, Callable[..., tuple[Array, ...]]] = {"heads": _by_head, "latents": _over_latents}
