"""Where the tokens of a packed batch are written."""

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
