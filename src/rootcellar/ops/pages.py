"""Packed batches: where their tokens are written, and queries beside their KV heads."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def places(tables: Array, rows: Array, positions: Array, page_size: int) -> tuple[Array, Array]:
    """Page and offset in it of each token of a packed batch (see ``backends``); page 0 for padding.

    A batch of one token gets a second place, in page 0: a scatter of one update becomes a dynamic-update-slice that XLA
    for CPUs copies into every consumer, and the whole pool with it.
    """
    tile = positions.shape[0] // rows.shape[0]
    at = jnp.maximum(positions, 0)
    pages = jnp.where(positions >= 0, tables[jnp.repeat(rows, tile), at // page_size], 0)
    offsets = jnp.where(positions >= 0, at % page_size, 0)
    if len(positions) == 1:
        pages, offsets = jnp.pad(pages, (0, 1)), jnp.pad(offsets, (0, 1))
    return pages, offsets


def padded(updates: Array, places: Array) -> Array:
    """``updates`` [T, ...] with zeros for the places that are there beside the batch's."""
    return jnp.pad(updates, [(0, len(places) - len(updates))] + [(0, 0)] * (updates.ndim - 1))


def by_kv_head(q: Array, kv_heads: int, tiles: int) -> Array:
    """Queries ``[T, heads, D]`` as ``[tiles, kv_heads, queries, D]``: a tile's tokens, each with its heads together."""
    n, heads, dim = q.shape
    q = q.reshape(tiles, n // tiles, kv_heads, heads // kv_heads, dim)
    return q.transpose(0, 2, 1, 3, 4).reshape(tiles, kv_heads, -1, dim)


def by_token(out: Array, tokens: int) -> Array:
    """The inverse of :func:`by_kv_head`: ``[T, heads, D]``; a tile has so many ``tokens``."""
    tiles, kv_heads, queries, dim = out.shape
    out = out.reshape(tiles, kv_heads, tokens, queries // tokens, dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(tiles * tokens, -1, dim)


def sinks_by_kv_head(sinks: Array, kv_heads: int, tokens: int) -> Array:
    """Sinks ``[heads]`` beside the queries of a tile of so many ``tokens``: ``[kv_heads, queries]``."""
    group = len(sinks) // kv_heads
    return jnp.broadcast_to(sinks.reshape(kv_heads, 1, group), (kv_heads, tokens, group)).reshape(kv_heads, -1)
