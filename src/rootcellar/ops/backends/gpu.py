"""Attention for GPUs over pages as they lie, keys and values by head and latents alike (``ops/paged_gpu.py``).

JAX has ``paged_attention`` for GPUs, which is deprecated and knows one query a row, and no windows, chunks, sinks or
latents.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array

from rootcellar.ops.backends.backend import Attend
from rootcellar.ops.backends.xla import write
from rootcellar.ops.pages import by_kv_head, by_token, sinks_by_kv_head
from rootcellar.ops.reach import Reach
from rootcellar.pools import Layout
from rootcellar.pools.layouts import PagedHeads, PagedLatents, TokenLayout

_DTYPES = ("float32", "bfloat16", "float16")
_WIDTH = 16
"""A head is read in parts that are powers of two, at least so long."""


def prefers(layout: Layout, platform: str) -> Layout:  # noqa: ARG001 - it runs on GPUs alone
    """See ``Backend``: it reads pages as they lie."""
    return layout


def lacks(layout: Layout, platform: str) -> str | None:
    """See ``Backend``."""
    if platform != "gpu":
        return f"it runs on GPUs, and the device is a {platform}"
    return unfit(layout)


def unfit(layout: Layout) -> str | None:
    """Why the kernel cannot attend over pages of ``layout``, wherever it runs; None: it can."""
    if not isinstance(layout, PagedHeads | PagedLatents):
        return f"it reads the layouts 'heads' and 'latents', and the cache has {layout.name!r}"
    if str(layout.dtype) not in _DTYPES:
        return f"it reads pools of {', '.join(_DTYPES)}, and kv_cache_dtype is {layout.dtype}"
    width = layout.head_dim if isinstance(layout, PagedHeads) else layout.dim
    if width % _WIDTH:
        return f"it has no kernel for heads of {width} elements, only for multiples of {_WIDTH}"
    return None


def attend(layout: TokenLayout, reach: Reach, *, interpret: bool = False) -> Attend:
    """See ``Backend``. ``interpret``: as JAX computes it anywhere, for tests."""
    if isinstance(layout, PagedLatents):
        return functools.partial(_over_latents, layout, reach, interpret)
    return functools.partial(_by_head, layout, reach, interpret)


def _by_head(
    layout: TokenLayout, reach: Reach, interpret: bool, q: Array, k: Array, v: Array, sinks: Array,
    tables: Array, rows: Array, positions: Array, *buffers: Array,
) -> tuple[Array, ...]:  # fmt: skip
    (pool,) = write(layout, buffers, (k, v), tables, rows, positions)
    tiles, kv_heads = len(rows), k.shape[1]
    tile = len(q) // tiles
    q, sinks = by_kv_head(q, kv_heads, tiles), sinks_by_kv_head(sinks, kv_heads, tile)
    out = _attend(reach, interpret, (0, 1), q, sinks, tables, rows, positions, pool)
    return by_token(out, tile), pool


def _over_latents(
    layout: TokenLayout, reach: Reach, interpret: bool, q: Array, latents: Array,
    tables: Array, rows: Array, positions: Array, *buffers: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """One head, whose values are its keys: the pool is read once for both."""
    (pool,) = write(layout, buffers, (latents,), tables, rows, positions)
    shape = q.shape
    q = q.reshape(len(rows), 1, -1, shape[-1])
    none = jnp.full(q.shape[1:3], -jnp.inf)
    return _attend(reach, interpret, (0, 0), q, none, tables, rows, positions, pool[:, None, None]).reshape(shape), pool


def _attend(reach: Reach, interpret: bool, *arguments: Array | tuple[int, int]) -> Array:
    from rootcellar.ops.paged_gpu import attend  # Pallas takes a while to import, and is for accelerators alone

    return attend(reach, interpret, *arguments)
