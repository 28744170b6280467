"""Programs that copy pages in one pass between pools and host memory, in C++ (``native/copy_pages.cc``), on CPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rootcellar import pools
from rootcellar.compiled import open_library

_READ, _WRITE = "rootcellar_read_pages", "rootcellar_write_pages"


@functools.cache
def available() -> bool:
    """Whether they can run here: on a CPU, and where they were built and are wanted."""
    if jax.default_backend() != "cpu":
        return False
    targets = {_READ: "RootcellarReadPages", _WRITE: "RootcellarWritePages"}
    return open_library(pools.__path__, "_copies.so", targets, "pages are copied through XLA") is not None


def programs(offsets: Sequence[int]) -> tuple[Callable[..., Array], Callable[..., tuple[Any, Array]]]:
    """``read(buffers, pages [N], addresses uint32 [N, 2])`` and ``write`` with the same arguments, the buffers donated.

    ``offsets``: where each array of the buffers, layer by layer, begins in an image. Both give an array that is ready
    when they are done, ``write`` after the buffers. Address 0 is padding.
    """
    where = np.asarray(offsets, np.int64)
    done = jax.ShapeDtypeStruct((1,), jnp.uint32)

    def read(buffers: list[tuple[Array, ...]], pages: Array, addresses: Array) -> Array:
        call = jax.ffi.ffi_call(_READ, done)
        return call(pages, addresses, *jax.tree.leaves(buffers), offsets=where)

    def write(buffers: list[tuple[Array, ...]], pages: Array, addresses: Array) -> tuple[Any, Array]:
        buffers, form = jax.tree.flatten(buffers)
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in buffers]
        alias = {2 + i: 1 + i for i in range(len(buffers))}
        first, *new = jax.ffi.ffi_call(_WRITE, (done, *shapes), input_output_aliases=alias)(
            pages, addresses, *buffers, offsets=where
        )
        return jax.tree.unflatten(form, new), first

    return jax.jit(read), jax.jit(write, donate_argnums=0)
