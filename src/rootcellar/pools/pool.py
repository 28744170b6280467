"""The buffers that hold the cache's bytes: one for each layer, addressed by page.

A *layout* says how the bytes of one page of one layer lie; a *pool* owns the buffers of the layers of one kind. Buffers
are allocated once, by a compiled function (so that allocating them again compiles nothing), donated through every step
and never resized. Page 0 is the padding target: no request owns it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding, SingleDeviceSharding

from rootcellar.errors import EngineError


@dataclass(frozen=True)
class PagedKV:
    """K and V of ``kv_heads`` heads, page-major, K apart from V inside the page.

    A page is ``[2, kv_heads, page_size, head_dim]``: what a CPU reads fastest (interleaving K and V by head was
    measured four to five times slower there).
    """

    kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    def shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        """The buffer of one layer: ``[pages, 2, kv_heads, page_size, head_dim]``."""
        return (pages, 2, self.kv_heads, page_size, self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@functools.cache
def _allocator(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Callable[[], Array]:
    """A compiled function that gives a zeroed buffer at its place: the same function each time, compiled once.

    The place is said outright: an array without one ("uncommitted") would make the steps that take it compile anew.
    """
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


class Pool:
    """The buffers of the layers of one kind.

    ``buffers`` is donated to a step and must be replaced by what the step gives back.
    """

    def __init__(
        self, layout: PagedKV, layers: int, tokens: int, page_size: int, sharding: Sharding | None = None
    ) -> None:
        """Allocate ``layers`` buffers for ``tokens`` tokens (a multiple of ``page_size``) and the padding page.

        ``sharding``: where they lie; None: on the first device.
        """
        self.layout = layout
        self.sharding = sharding if sharding is not None else SingleDeviceSharding(jax.devices()[0])
        self.layers = layers
        self.page_size = page_size
        self.pages = tokens // page_size + 1
        self._buffers: list[Array] | None = None
        self.allocate()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each buffer."""
        return self.layout.shape(self.pages, self.page_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, allocated or not."""
        return self.layers * math.prod(self.shape) * self.layout.dtype.itemsize

    @property
    def buffers(self) -> list[Array]:
        """One array for each layer.

        Raises:
            EngineError: the pool is not allocated.
        """
        if self._buffers is None:
            raise EngineError("the KV cache is not allocated")
        return self._buffers

    @buffers.setter
    def buffers(self, new: list[Array]) -> None:
        self._buffers = new

    def allocate(self) -> None:
        """Allocate the buffers, zeroed. Does nothing when they are there; compiles nothing the second time."""
        if self._buffers is None:
            zeros = _allocator(self.shape, self.layout.dtype, self.sharding)
            # Waited for, so that too little memory is an error here and not in somebody's first step.
            self._buffers = jax.block_until_ready([zeros() for _ in range(self.layers)])

    def free(self) -> int:
        """Give the memory back at once, after the step in flight. Returns the bytes freed (0 if there were none)."""
        if self._buffers is None:
            return 0
        for buffer in self._buffers:
            buffer.block_until_ready()
            buffer.delete()
        self._buffers = None
        return self.nbytes
