"""Latents of multi-head latent attention (DeepSeek-V2) in rows of whole tiles, for TPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.plan.stored import Form
from rootcellar.pools.layouts.latents import PagedLatents
from rootcellar.pools.layouts.layout import Axes

_LANES = 128


@dataclass(frozen=True)
class PaddedLatents:
    """``PagedLatents`` with zeros behind each latent, up to the next multiple of 128.

    A TPU's tiles are 128 wide: rows of 576 take the room of 640 whatever they are called. Where that is not said, XLA
    makes the pages the innermost axis to save it, and brings the pool into another order and back in every step.
    """

    name: ClassVar[str] = "padded latents"
    form: ClassVar[Form] = "latents"
    axes: ClassVar[tuple[Axes, ...]] = ((),)
    turn: ClassVar[None] = None
    image: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1),)
    dim: int
    dtype: jnp.dtype
    page_size: int

    @classmethod
    def instead(cls, layout: PagedLatents) -> PaddedLatents:
        """Of the same latents."""
        return cls(layout.dim, layout.dtype, layout.page_size)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return -(-self.dim // _LANES) * _LANES

    @property
    def unfolded(self) -> tuple[tuple[int, ...], ...]:
        """Without what is behind the latents."""
        return ((self.page_size, self.dim),)

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One array, ``[pages, page_size, width]``."""
        return (jax.ShapeDtypeStruct((pages, self.page_size, self.width), self.dtype),)

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        (pool,), (latents,) = buffers, parts
        rows = jnp.pad(latents.astype(pool.dtype), ((0, 0), (0, self.width - self.dim)))
        return (pool.at[pages, offsets].set(rows),)

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        return (buffers[0][pages][..., : self.dim].astype(jnp.float32),)
