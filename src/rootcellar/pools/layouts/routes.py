"""The experts that a model's routers chose for each token: a page of numbers beside the pages of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.plan.grids import NARROW
from rootcellar.plan.stored import DTYPES, Form, Routes
from rootcellar.pools.layouts.layout import Axes, as_it_lies

SERVES = (*DTYPES, *NARROW)


@dataclass(frozen=True)
class PagedRoutes:
    """Of each token the numbers of ``top_k`` experts in each of ``layers`` layers, whole on every device."""

    name: ClassVar[str] = "routes"
    form: ClassVar[Form] = "routes"
    axes: ClassVar[tuple[Axes, ...]] = ((),)
    turn: ClassVar[None] = None
    image: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1, 2),)
    unfolded = property(as_it_lies)
    layers: int
    top_k: int
    dtype: jnp.dtype
    page_size: int

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One array, ``[pages, page_size, layers, top_k]``."""
        return (jax.ShapeDtypeStruct((pages, self.page_size, self.layers, self.top_k), self.dtype),)

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``; the one part is ``[N, layers, top_k]``."""
        (pool,), (chosen,) = buffers, parts
        return (pool.at[pages, offsets].set(chosen.astype(pool.dtype)),)

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """See ``TokenLayout``; nothing attends over them."""
        return (buffers[0][pages].astype(jnp.float32),)


def make(stored: Routes, dtype: str, page_size: int) -> PagedRoutes:  # noqa: ARG001 - numbers of experts are whole
    """The layout of pages of ``page_size`` tokens."""
    return PagedRoutes(stored.layers, stored.top_k, jnp.dtype(stored.dtype), page_size)
