"""Latents of multi-head latent attention (DeepSeek-V2), each element in the KV cache's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.plan.stored import DTYPES, Form, Latents
from rootcellar.pools.layouts.layout import Axes, as_it_lies

SERVES = tuple(DTYPES)


@dataclass(frozen=True)
class PagedLatents:
    """The compressed keys and values of all heads, then the rotated part of the key: ``dim`` elements in all.

    Every device needs the whole latent.
    """

    name: ClassVar[str] = "latents"
    form: ClassVar[Form] = "latents"
    axes: ClassVar[tuple[Axes, ...]] = ((),)
    turn: ClassVar[None] = None
    image: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1),)
    unfolded = property(as_it_lies)
    dim: int
    dtype: jnp.dtype
    page_size: int

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One array, ``[pages, page_size, dim]``."""
        return (jax.ShapeDtypeStruct((pages, self.page_size, self.dim), self.dtype),)

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        (pool,), (latents,) = buffers, parts
        return (pool.at[pages, offsets].set(latents.astype(pool.dtype)),)

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        return (buffers[0][pages].astype(jnp.float32),)


def make(stored: Latents, dtype: str, page_size: int) -> PagedLatents:
    """The layout of pages of ``page_size`` tokens."""
    return PagedLatents(stored.rank + stored.rope_dim, jnp.dtype(dtype), page_size)
