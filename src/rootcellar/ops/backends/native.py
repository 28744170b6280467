"""Attention in C++ behind XLA's foreign-function interface, for CPUs (``ops/native/``).

It works on the pool in place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rootcellar.ops.backends.backend import Attend
from rootcellar.ops.kernels import built, runs_vectors, vectors
from rootcellar.ops.reach import Reach
from rootcellar.pools import Layout
from rootcellar.pools.layouts import NarrowHeads, TokenLayout

# What XLA calls attention over each layout.
_TARGETS = {
    "heads": "rootcellar_attention_by_head",
    "latents": "rootcellar_attention_over_latents",
    "narrow heads": "rootcellar_attention_over_codes",
}


def prefers(layout: Layout, platform: str) -> Layout:  # noqa: ARG001 - it runs on CPUs alone
    """See ``Backend``."""
    return layout


def lacks(layout: Layout, platform: str) -> str | None:
    """See ``Backend``: it reads some layouts, in some types, whose dimensions fill vectors."""
    if platform != "cpu":
        return f"it runs on CPUs, and the device is a {platform}"
    if layout.form == "states":
        return f"nothing attends over {layout.form}"
    if layout.name not in _TARGETS:
        return f"it reads the layouts {', '.join(map(repr, _TARGETS))}, and the cache has {layout.name!r}"
    array, *_ = layout.buffers(1)
    if not isinstance(layout, NarrowHeads) and array.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it reads float32 and bfloat16 pools, and kv_cache_dtype is {array.dtype}"
    if built() is None:
        return "the package was installed without a C++ compiler, or ROOTCELLAR_NO_NATIVE=1 is set"
    if not runs_vectors(vectors()):
        return f"ROOTCELLAR_VECTORS={vectors()!r} is no instruction set that it is compiled for and that runs here"
    size = layout.head_dim if isinstance(layout, NarrowHeads) else array.shape[-1]
    return None if size % 16 == 0 else f"it has no kernel for rows of {size} elements, only for multiples of 16"


def attend(layout: TokenLayout, reach: Reach, *, fixed: bool = False) -> Attend:
    """See ``Backend``. ``fixed``: each sum in one order, whatever else is in the batch."""
    built()
    if isinstance(layout, NarrowHeads):
        return functools.partial(_attend_codes, layout, vectors(), reach)
    return functools.partial(_attend, _TARGETS[layout.name], vectors(), reach, fixed)


def _attend_codes(layout: NarrowHeads, vectors: str, reach: Reach, *arguments: Array) -> tuple[Array, ...]:
    """The kernel makes codes of the batch's keys and values, as ``layout.write`` would, and turns what is to be turned.

    ``arguments``: queries, keys and values, sinks, tables, rows and positions; the pools.
    """
    *rest, a, b, c, d = arguments
    (q, k, v), where, pools = (x.astype(jnp.float32) for x in rest[:3]), rest[3:], (a, b, c, d)
    call = jax.ffi.ffi_call(
        _TARGETS[layout.name],
        (jax.ShapeDtypeStruct(q.shape, jnp.float32), *(jax.ShapeDtypeStruct(p.shape, p.dtype) for p in pools)),
        input_output_aliases={len(rest) + i: 1 + i for i in range(len(pools))},
    )
    out, *new = call(
        q, k, v, *where, *pools,
        keys=layout.keys.name, values=layout.values.name, turned=layout.turned, vectors=vectors, **_seen(reach),
    )  # fmt: skip
    return out, *new


def _attend(target: str, vectors: str, reach: Reach, fixed: bool, q: Array, *rest: Array) -> tuple[Array, ...]:
    """``rest``: what is stored of each token, by head the sinks too; tables, rows and positions; the pool."""
    *parts, tables, rows, positions, pool = rest
    call = jax.ffi.ffi_call(
        target,
        (jax.ShapeDtypeStruct(pool.shape, pool.dtype), jax.ShapeDtypeStruct(q.shape, jnp.float32)),
        input_output_aliases={len(rest): 0},
    )
    floats = [part.astype(jnp.float32) for part in (q, *parts)]
    pool, out = call(*floats, tables, rows, positions, pool, vectors=vectors, fixed=fixed, **_seen(reach))
    return out, pool


def _seen(reach: Reach) -> dict[str, np.generic]:
    """What queries see, as the kernels are told."""
    return {
        "scale": np.float32(reach.scale),
        "softcap": np.float32(reach.softcap),
        "window": np.int64(reach.span if reach.rule == "sliding_window" else 0),
        "chunk": np.int64(reach.span if reach.rule == "chunked_local" else 0),
    }
