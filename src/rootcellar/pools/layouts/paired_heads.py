"""Keys and values by head (MHA, GQA, MQA), those of a token beside each other: what a TPU's tiles are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.plan.stored import Form
from rootcellar.pools.layouts.heads import PagedHeads
from rootcellar.pools.layouts.layout import Axes


@dataclass(frozen=True)
class PairedHeads:
    """A key and its value in one row, head by head: a page is ``[kv_heads, page_size, 2 * head_dim]``.

    A TPU keeps the last two axes in tiles of 8 or 16 by 128 elements and fills up what is smaller: heads of 64 that lay
    apart would take twice their memory. Side by side they fill the 128, a page is whole tiles in one piece, and a token
    is written in one row for each head.
    """

    name: ClassVar[str] = "paired heads"
    form: ClassVar[Form] = "heads"
    axes: ClassVar[tuple[Axes, ...]] = ((None, "kv_heads"),)
    turn: ClassVar[None] = None
    image: ClassVar[tuple[tuple[int, ...], ...]] = ((2, 0, 1, 3),)
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    page_size: int

    @classmethod
    def instead(cls, layout: PagedHeads) -> PairedHeads:
        """Of the same keys and values."""
        return cls(layout.kv_heads, layout.head_dim, layout.dtype, layout.page_size)

    @property
    def unfolded(self) -> tuple[tuple[int, ...], ...]:
        """Keys apart from values: ``[kv_heads, page_size, 2, head_dim]``."""
        return ((self.kv_heads, self.page_size, 2, self.head_dim),)

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One array, ``[pages, kv_heads, page_size, 2 * head_dim]``."""
        return (jax.ShapeDtypeStruct((pages, self.kv_heads, self.page_size, 2 * self.head_dim), self.dtype),)

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``.

        Heads are counted out: were they a slice between two indices, XLA would bring the pool into another order for
        the scatter and back, in every step.
        """
        (pool,) = buffers
        rows = jnp.concatenate(list(parts), axis=-1).astype(pool.dtype)
        return (pool.at[pages[:, None], jnp.arange(pool.shape[1]), offsets[:, None]].set(rows),)

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """See ``TokenLayout``."""
        kv = buffers[0][pages].astype(jnp.float32)
        return kv[..., : self.head_dim], kv[..., self.head_dim :]
