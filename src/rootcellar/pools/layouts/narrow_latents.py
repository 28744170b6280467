"""Latents of multi-head latent attention in 8 bits, but for the part of the key that is turned by its position.

That part says where a token stands, in few elements of which some are large, and stays wide (as DeepSeek and others
keep it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.plan.grids import NARROW, Grid
from rootcellar.plan.stored import LATENT_TYPES, WIDE, Form, Latents
from rootcellar.pools.layouts.codes import code_arrays, decode, encode, hadamard, turned
from rootcellar.pools.layouts.layout import Axes, as_it_lies

SERVES = LATENT_TYPES


@dataclass(frozen=True)
class NarrowLatents:
    """The compressed part of ``rank`` elements as codes, the ``rope_dim`` turned elements of the key, the scales."""

    name: ClassVar[str] = "narrow latents"
    form: ClassVar[Form] = "latents"
    axes: ClassVar[tuple[Axes, ...]] = ((), (), ())
    image: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1), (0, 1), (0,))
    unfolded = property(as_it_lies)
    rank: int
    rope_dim: int
    grid: Grid
    turned: bool
    page_size: int

    @property
    def turn(self) -> NDArray[np.float32] | None:
        """See ``TokenLayout``."""
        if not self.turned:
            return None
        matrix = np.eye(self.rank + self.rope_dim, dtype=np.float32)
        matrix[: self.rank, : self.rank] = hadamard(self.rank)
        return matrix

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """``[pages, page_size, rank]``, ``[pages, page_size, rope_dim]`` and ``[pages, page_size]``."""
        codes, scales = code_arrays(self.grid, (pages, self.page_size), self.rank)
        return codes, jax.ShapeDtypeStruct((pages, self.page_size, self.rope_dim), WIDE), scales

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        (latents,) = parts
        compressed = latents[:, : self.rank]
        codes, scales = encode(self.grid, turned(compressed) if self.turned else compressed)
        new = codes, latents[:, self.rank :].astype(WIDE), scales
        return tuple(pool.at[pages, offsets].set(part) for pool, part in zip(buffers, new, strict=True))

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        codes, rope, scales = (pool[pages] for pool in buffers)
        return (jnp.concatenate([decode(self.grid, codes, scales), rope.astype(jnp.float32)], axis=-1),)


def make(stored: Latents, dtype: str, page_size: int) -> NarrowLatents:
    """The layout of pages of ``page_size`` tokens."""
    narrow = NARROW[dtype]
    return NarrowLatents(stored.rank, stored.rope_dim, narrow.keys, narrow.turned, page_size)
