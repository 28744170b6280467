"""Paged attention over latents, which all heads share (multi-head latent attention: DeepSeek-V2, 2024).

A *latent* is the compressed key and value of a token, then the part of the key that is turned by its position. Keys and
values of a head are linear maps of the compressed part; *absorbed*, these maps are applied to the query and to the
result instead, and attention is that of many query heads on one key head whose values are its keys. The pool is read
once for all heads, and no key or value of a head ever exists.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from rootcellar.ops.pages import BLOCK_TOKENS, MASKED, padded, places


def latent_attention(
    pool: Array, q: Array, latents: Array, tables: Array, rows: Array, positions: Array
) -> tuple[Array, Array]:
    """Write the latents of a packed batch into the pool, and attend to each row's pages.

    Args:
        pool: ``[pages, page_size, D]``, donated by the caller.
        q: ``[T, heads, D]``, absorbed and scaled.
        latents: ``[T, D]``.
        tables, rows, positions: as in ``attention.paged_attention``.

    Returns:
        float32 ``[T, heads, D]``, the weighted sums of latents, and the pool. Rows of padding hold nothing of meaning.
    """
    pool = write_latents(pool, latents, tables, rows, positions)
    page_size, dim = pool.shape[1:]
    n = rows.shape[0]
    tile, heads = positions.shape[0] // n, q.shape[1]
    per_block = max(1, BLOCK_TOKENS // page_size)
    block = per_block * page_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % per_block)))[rows]
    positions = positions.reshape(n, tile)
    newest = jnp.max(positions, axis=1)
    q = q.astype(jnp.float32).reshape(n, tile * heads, dim)

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        pages = lax.dynamic_slice_in_dim(tables, i * per_block, per_block, axis=1)
        at = i * block + jnp.arange(block)
        # A weight of zero does not silence a NaN that an earlier owner left in a slot that this row has not written.
        written = at <= newest[:, None]
        held = jnp.where(written[:, :, None], pool[pages].reshape(n, block, dim).astype(jnp.float32), 0.0)
        seen = jnp.repeat(at <= positions[:, :, None], heads, axis=1)  # [n, tile * heads, block]
        scores = jnp.where(seen, jnp.einsum("nqd,nsd->nqs", q, held), MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        # The turned part is summed as well, for nothing: cutting it off the block would be a copy.
        out = out * keep[..., None] + jnp.einsum("nqs,nsd->nqd", weights, held)
        return new_top, total * keep + jnp.sum(weights, axis=-1), out

    shape = (n, tile * heads)
    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, dim)))
    _, total, out = lax.fori_loop(0, (jnp.max(newest) + block) // block, body, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(n * tile, heads, dim), pool


def write_latents(pool: Array, latents: Array, tables: Array, rows: Array, positions: Array) -> Array:
    """Write the latents of a packed batch into their pages; padding goes to page 0. Shapes as above."""
    pages, offsets = places(tables, rows, positions, pool.shape[1])
    return pool.at[pages, offsets].set(padded(latents.astype(pool.dtype), pages))
