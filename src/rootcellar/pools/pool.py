"""The buffers that hold the cache's bytes, addressed by page.

A *layout* (``layouts/``) says how the bytes of one layer lie; a *pool* owns the buffers of the layers of one kind, or
of several that share them. Buffers are allocated once, by a compiled function (so that allocating them again compiles
nothing), donated through every step and never resized. Page 0 is the padding target: no request owns it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding, SingleDeviceSharding

from rootcellar.errors import EngineError
from rootcellar.pools.layouts import Layout


@functools.cache
def _allocator(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Callable[[], Array]:
    """A compiled function that gives a zeroed buffer at its place: the same function each time, compiled once.

    The place is said outright: an array without one ("uncommitted") would make the steps that take it compile anew.
    """
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


class Pool:
    """The buffers of so many layers: those of one kind, or of several that share them.

    ``buffers`` is donated to a step and must be replaced by what the step gives back.
    """

    def __init__(
        self, layout: Layout, layers: int, pages: int, shardings: Sequence[Sharding] | None = None, spare: int = 0
    ) -> None:
        """Allocate the buffers of ``layers`` layers for ``pages`` pages and the padding page.

        ``shardings``: where each of a layer's buffers lies; None: on the first device. ``spare``: pages behind the
        others that no cache knows: what a step writes there is read before the next one.
        """
        self.layout = layout
        self.layers = layers
        self.pages = pages
        self.spare = spare
        buffers = layout.buffers(pages + 1 + spare)
        here = SingleDeviceSharding(jax.devices()[0])
        self._placed = tuple(zip(buffers, shardings or (here,) * len(buffers), strict=True))
        self._buffers: list[tuple[Array, ...]] | None = None
        self.allocate()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, allocated or not."""
        return self.layers * sum(math.prod(a.shape) * a.dtype.itemsize for a, _ in self._placed)

    @property
    def shardings(self) -> tuple[Sharding, ...]:
        """Where each of a layer's buffers lies."""
        return tuple(sharding for _, sharding in self._placed)

    @property
    def buffers(self) -> list[tuple[Array, ...]]:
        """The buffers of each layer.

        Raises:
            EngineError: the pool is not allocated.
        """
        if self._buffers is None:
            raise EngineError("the KV cache is not allocated")
        return self._buffers

    @buffers.setter
    def buffers(self, new: list[tuple[Array, ...]]) -> None:
        self._buffers = new

    def allocate(self) -> None:
        """Allocate the buffers, zeroed. Does nothing when they are there; compiles nothing the second time."""
        if self._buffers is None:
            new = [
                tuple(_allocator(a.shape, a.dtype, sharding)() for a, sharding in self._placed)
                for _ in range(self.layers)
            ]
            # Waited for, so that too little memory is an error here and not in somebody's first step.
            self._buffers = jax.block_until_ready(new)

    def free(self) -> int:
        """Give the memory back at once, after the step in flight. Returns the bytes freed (0 if there were none)."""
        if self._buffers is None:
            return 0
        for buffer in jax.tree.leaves(self._buffers):
            buffer.block_until_ready()
            buffer.delete()
        self._buffers = None
        return self.nbytes
