"""Keys and values by head (MHA, GQA, MQA), each element in the KV cache's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.plan.stored import DTYPES, Form, Heads
from rootcellar.pools.layouts.layout import Axes, as_it_lies

SERVES = tuple(DTYPES)


@dataclass(frozen=True)
class PagedHeads:
    """K and V of ``kv_heads`` heads, page-major, K apart from V inside the page.

    A page is ``[2, kv_heads, page_size, head_dim]``: what a CPU reads fastest (interleaving K and V by head was
    measured four to five times slower there).
    """

    name: ClassVar[str] = "heads"
    form: ClassVar[Form] = "heads"
    axes: ClassVar[tuple[Axes, ...]] = ((None, None, "kv_heads"),)
    turn: ClassVar[None] = None
    image: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1, 2, 3),)
    unfolded = property(as_it_lies)
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    page_size: int

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One array, ``[pages, 2, kv_heads, page_size, head_dim]``."""
        return (jax.ShapeDtypeStruct((pages, 2, self.kv_heads, self.page_size, self.head_dim), self.dtype),)

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        (pool,) = buffers
        return (pool.at[pages, :, :, offsets].set(jnp.stack(list(parts), axis=1).astype(pool.dtype)),)

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        kv = buffers[0][pages].astype(jnp.float32)
        return kv[..., 0, :, :, :], kv[..., 1, :, :, :]


def make(stored: Heads, dtype: str, page_size: int) -> PagedHeads:
    """The layout of pages of ``page_size`` tokens."""
    return PagedHeads(stored.kv_heads, stored.head_dim, jnp.dtype(dtype), page_size)
