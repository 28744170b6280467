"""Where an array lies, and in which order of its axes where that is said.

A TPU keeps the last two axes of an array, as it lies, in tiles of 8 by 128. Where nothing is said XLA takes the order
of axes that fills up least, which for experts may be with the experts themselves innermost, for embeddings with the
tokens; each step then brings all of them into another order first. Elsewhere arrays lie in the order of their axes,
which need not be said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

WeightPlace = Sharding | Format
"""On which devices, and perhaps in which order."""
_TILE = (8, 128)
_MOST_EDGES = 1 / 8
"""Of an array's bytes, for which its order is said: more is not worth the memory."""


def sharding_of(place: WeightPlace) -> Sharding:
    """On which devices."""
    return place if isinstance(place, Sharding) else _of(place.sharding)


def _of(sharding: Any) -> Sharding:
    assert isinstance(sharding, Sharding)
    return sharding


def in_order(shape: Sequence[int], at: Sharding) -> WeightPlace:
    """A place where an array lies in the order of its axes, unless edges of tiles add too much."""
    of_device = at.shard_shape(tuple(shape))
    if _filled(of_device) > math.prod(of_device) * (1 + _MOST_EDGES):
        return at
    return Format(Layout(tuple(range(len(shape)))), at)


def lies_at(array: Array, place: WeightPlace) -> bool:
    """Whether an array that is on the devices of ``place`` lies there in its order, too."""
    wanted = _order(place)
    return wanted is None or _order(array.format) == wanted


def device_bytes(array: Any) -> int:
    """Bytes that one device has of an abstract array; where its order is said, with the edges of tiles."""
    shape, order = array.sharding.shard_shape(array.shape), _order(array.format)
    count = math.prod(shape) if order is None else _filled([shape[axis] for axis in order])
    return count * np.dtype(array.dtype).itemsize


def _order(place: WeightPlace) -> tuple[int, ...] | None:
    layout = place.layout if isinstance(place, Format) else None
    return layout.major_to_minor if isinstance(layout, Layout) else None


def _filled(lengths: Sequence[int]) -> int:
    """Elements of an array with axes of these ``lengths``, the innermost last, in whole tiles."""
    *outer, rows, columns = lengths
    return math.prod(outer) * (-(-rows // _TILE[0]) * _TILE[0]) * (-(-columns // _TILE[1]) * _TILE[1])
