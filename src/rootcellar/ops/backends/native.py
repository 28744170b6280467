"""Attention in C++ behind XLA's foreign-function interface, for CPUs (``ops/native/paged_attention.cc``).

It works on the pool in place.
"""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rootcellar import ops
from rootcellar.compiled import open_library
from rootcellar.ops.backends.backend import Attend
from rootcellar.ops.reach import Reach
from rootcellar.pools import Layout
from rootcellar.pools.layouts import TokenLayout

_TARGET = "rootcellar_paged_attention"


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The shared library with the CPU kernel, registered with XLA; None where it was not built or is not wanted."""
    return open_library(ops.__path__, "_native.so", {_TARGET: "RootcellarPagedAttention"}, "attention runs through XLA")


def lacks(layout: Layout, platform: str) -> str | None:
    """See ``Backend``: it reads one order of bytes, in two types, for the head dimensions that it was compiled for."""
    if platform != "cpu":
        return f"it runs on CPUs, and the device is a {platform}"
    if layout.form != "heads":
        return f"it attends by head, and a layer of this model stores {layout.form}"
    if layout.name != "heads":
        return f"it reads the layout 'heads', and the cache has {layout.name!r}"
    (array,) = layout.buffers(1)
    if array.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it reads float32 and bfloat16 pools, and kv_cache_dtype is {array.dtype}"
    opened = kernel()
    if opened is None:
        return "the package was installed without a C++ compiler, or ROOTCELLAR_NO_NATIVE=1 is set"
    head_dim = array.shape[-1]
    return None if opened.rootcellar_has_kernel(head_dim) else f"it has no kernel for head_dim {head_dim}"


def attend(layout: TokenLayout, reach: Reach) -> Attend:  # noqa: ARG001 - it reads one alone
    """See ``Backend``."""
    kernel()
    return functools.partial(_by_head, reach)


def _by_head(
    reach: Reach, q: Array, k: Array, v: Array, sinks: Array, tables: Array, rows: Array, positions: Array, pool: Array
) -> tuple[Array, ...]:
    call = jax.ffi.ffi_call(
        _TARGET,
        (jax.ShapeDtypeStruct(pool.shape, pool.dtype), jax.ShapeDtypeStruct(q.shape, jnp.float32)),
        input_output_aliases={7: 0},
    )
    f32 = jnp.float32
    pool, out = call(
        q.astype(f32), k.astype(f32), v.astype(f32), sinks, tables, rows, positions, pool,
        scale=np.float32(reach.scale),
        window=np.int64(reach.span if reach.rule == "sliding_window" else 0),
        chunk=np.int64(reach.span if reach.rule == "chunked_local" else 0),
    )  # fmt: skip
    return out, pool
