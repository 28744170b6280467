"""Attention in plain JAX, for any device and every layout: it reads and writes pages as the layout does.

Blocks of pages are gathered in a loop whose length is the longest row's, so that one compiled step serves every context
length, with an online softmax (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jax import Array, lax

from rootcellar.ops.backends.backend import Attend
from rootcellar.ops.pages import padded, places
from rootcellar.ops.reach import Reach
from rootcellar.plan.sizing import BLOCK_TOKENS
from rootcellar.pools import Layout
from rootcellar.pools.layouts import TokenLayout

# The score of a position that is not seen.
MASKED = -1e30


def lacks(layout: Layout, platform: str) -> str | None:  # noqa: ARG001 - it runs everywhere
    """See ``Backend``."""
    return None if layout.form in _BY_FORM else f"nothing attends over {layout.form}"


def attend(layout: TokenLayout, reach: Reach) -> Attend:
    """See ``Backend``."""
    return functools.partial(_BY_FORM[layout.form], layout, reach)


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
    buffers = write(layout, buffers, (k, v), tables, rows, positions)
    kv_heads, head_dim = k.shape[1:]
    page_size = layout.page_size
    n = rows.shape[0]
    tile = positions.shape[0] // n
    group = q.shape[1] // kv_heads
    per_block = max(1, BLOCK_TOKENS // page_size)
    block = per_block * page_size
    positions = positions.reshape(n, tile)
    q = q.reshape(n, tile, kv_heads, group, head_dim).astype(jnp.float32) * reach.scale
    # Each tile's blocks begin at the first page that its first token sees.
    first = reach.first(positions[:, 0]) // page_size
    pages_of = _block_of_pages(reach, tables, rows, first, per_block)
    newest = jnp.max(positions, axis=1)
    blocks = (jnp.max(newest - first * page_size) + block) // block

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        keys, values = layout.read(buffers, pages_of(i))  # [n, per_block, kv_heads, page_size, head_dim]
        # Slots that nobody has written for this row hold what an earlier owner left, which may be anything: a weight of
        # zero does not silence a NaN.
        at = (first[:, None] * page_size + i * block + jnp.arange(block)).reshape(n, per_block, page_size)
        written = at <= newest[:, None, None]
        values = jnp.where(written[:, :, None, :, None], values, 0.0)
        s = jnp.einsum("nthgd,nbhpd->nhgtbp", q, keys).reshape(n, kv_heads, group, tile, block)
        seen = reach.sees(positions[:, :, None], at.reshape(n, 1, block))  # [n, tile, block]
        s = jnp.where(seen[:, None, None], s, MASKED)
        new_top = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.where(seen[:, None, None], jnp.exp(s - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        sums = jnp.einsum("nhgtbp,nbhpd->nhgtd", p.reshape(n, kv_heads, group, tile, per_block, page_size), values)
        return new_top, total * keep + jnp.sum(p, axis=-1), out * keep[..., None] + sums

    shape = (n, kv_heads, group, tile)
    sinks = jnp.broadcast_to(sinks.reshape(kv_heads, group, 1), shape)
    start = (jnp.maximum(sinks, MASKED), jnp.where(sinks > MASKED, 1.0, 0.0), jnp.zeros((*shape, head_dim)))
    _, total, out = lax.fori_loop(0, blocks, body, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(n * tile, kv_heads * group, head_dim), *buffers


def _block_of_pages(reach: Reach, tables: Array, rows: Array, first: Array, per_block: int) -> Callable[[Array], Array]:
    """A function from a block's number to its pages, int32 [tiles, per_block], of each tile from ``first`` on."""
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % per_block)))[rows]
    if reach.rule == "full":  # every tile begins at 0: a slice is cheaper than a gather
        return lambda i: lax.dynamic_slice_in_dim(tables, i * per_block, per_block, axis=1)

    def pages_of(i: Array) -> Array:
        at = first[:, None] + i * per_block + jnp.arange(per_block)
        return jnp.take_along_axis(tables, at, axis=1, mode="fill", fill_value=0)

    return pages_of


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
    page_size, dim = layout.page_size, latents.shape[1]
    n = rows.shape[0]
    tile, heads = positions.shape[0] // n, q.shape[1]
    per_block = max(1, BLOCK_TOKENS // page_size)
    block = per_block * page_size
    positions = positions.reshape(n, tile)
    newest = jnp.max(positions, axis=1)
    first = reach.first(positions[:, 0]) // page_size
    pages_of = _block_of_pages(reach, tables, rows, first, per_block)
    q = q.astype(jnp.float32).reshape(n, tile * heads, dim) * reach.scale

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        (held,) = layout.read(buffers, pages_of(i))  # [n, per_block, page_size, dim]
        at = first[:, None] * page_size + i * block + jnp.arange(block)  # [n, block]
        # A weight of zero does not silence a NaN that an earlier owner left in a slot that this row has not written.
        held = jnp.where((at <= newest[:, None])[:, :, None], held.reshape(n, block, dim), 0.0)
        seen = jnp.repeat(reach.sees(positions[:, :, None], at[:, None]), heads, axis=1)  # [n, tile * heads, block]
        scores = jnp.where(seen, jnp.einsum("nqd,nsd->nqs", q, held), MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        # The turned part is summed as well, for nothing: cutting it off the block would be a copy.
        out = out * keep[..., None] + jnp.einsum("nqs,nsd->nqd", weights, held)
        return new_top, total * keep + jnp.sum(weights, axis=-1), out

    shape = (n, tile * heads)
    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, dim)))
    _, total, out = lax.fori_loop(0, (jnp.max(newest - first * page_size) + block) // block, body, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(n * tile, heads, dim), *buffers


_BY_FORM: Mapping[str, Callable[..., tuple[Array, ...]]] = {"heads": _by_head, "latents": _over_latents}
