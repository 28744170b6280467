"""Keys and values by head (MHA, GQA, MQA) in few bits, with scales of their own: see ``plan.grids.NARROW``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.plan.grids import NARROW, Grid
from rootcellar.plan.stored import Form, Heads
from rootcellar.pools.layouts.codes import code_arrays, decode, encode, hadamard, turned
from rootcellar.pools.layouts.layout import Axes, as_it_lies

SERVES = tuple(NARROW)


@dataclass(frozen=True)
class NarrowHeads:
    """Keys, values, scales of keys, scales of values: each ``[kv_heads, page_size, ...]`` in a page."""

    name: ClassVar[str] = "narrow heads"
    form: ClassVar[Form] = "heads"
    axes: ClassVar[tuple[Axes, ...]] = ((None, "kv_heads"),) * 4
    unfolded = property(as_it_lies)
    kv_heads: int
    head_dim: int
    keys: Grid
    values: Grid
    turned: bool
    page_size: int

    @property
    def image(self) -> tuple[tuple[int, ...], ...]:
        """As they are."""
        return tuple(tuple(range(len(array.shape) - 1)) for array in self.buffers(1))

    @property
    def turn(self) -> NDArray[np.float32] | None:
        """See ``TokenLayout``."""
        return hadamard(self.head_dim) if self.turned else None

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Four arrays, ``[pages, kv_heads, page_size, bytes]`` twice and the scales of ``codes.code_arrays`` twice."""
        lead = (pages, self.kv_heads, self.page_size)
        (keys, key_scales), (values, value_scales) = (
            code_arrays(grid, lead, self.head_dim) for grid in (self.keys, self.values)
        )
        return keys, values, key_scales, value_scales

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        keys, values = map(turned, parts) if self.turned else parts
        (k, key_scales), (v, value_scales) = encode(self.keys, keys), encode(self.values, values)
        fresh = k, v, key_scales, value_scales
        return tuple(pool.at[pages, :, offsets].set(new) for pool, new in zip(buffers, fresh, strict=True))

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        keys, values, key_scales, value_scales = (pool[pages] for pool in buffers)
        return decode(self.keys, keys, key_scales), decode(self.values, values, value_scales)


def make(stored: Heads, dtype: str, page_size: int) -> NarrowHeads:
    """The layout of pages of ``page_size`` tokens."""
    narrow = NARROW[dtype]
    layout = NarrowHeads(stored.kv_heads, stored.head_dim, narrow.keys, narrow.values, narrow.turned, page_size)
    layout.buffers(1)  # says which vectors it has no blocks for
    return layout
