"""Attention for TPUs over pages in which a key and its value lie side by side, and over latents (``ops/paged.py``).

JAX has ``ragged_paged_attention``, which knows no sinks, chunks or latents, and reads what lies before a window too.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.ops.backends.backend import Attend
from rootcellar.ops.backends.xla import write
from rootcellar.ops.pages import by_kv_head, by_token, sinks_by_kv_head
from rootcellar.ops.reach import Reach
from rootcellar.pools import Layout
from rootcellar.pools.layouts import PaddedLatents, PairedHeads, TokenLayout, tiled

_LANES = 128
_MOST_QUERIES = 256
"""Queries of a head in one program of the kernel, as far as heads can be cut."""
_ROWS = {"float32": 8, "bfloat16": 16}
"""Of a tile of each type that the kernel reads: a page is whole tiles."""


def prefers(layout: Layout, platform: str) -> Layout:  # noqa: ARG001 - it runs on TPUs alone
    """See ``Backend``: keys and values of few bits lie as ever."""
    return tiled(layout)


def lacks(layout: Layout, platform: str) -> str | None:
    """See ``Backend``: it reads what fills tiles."""
    if platform != "tpu":
        return f"it runs on TPUs, and the device is a {platform}"
    return unfit(layout)


def unfit(layout: Layout) -> str | None:
    """Why the kernel cannot attend over pages of ``layout``, wherever it runs; None: it can."""
    if not isinstance(layout, PairedHeads | PaddedLatents):
        return f"it reads the layouts 'paired heads' and 'padded latents', and the cache has {layout.name!r}"
    dtype = str(layout.dtype)
    if dtype not in _ROWS:
        return f"it reads float32 and bfloat16 pools, and kv_cache_dtype is {dtype}"
    if layout.page_size % _ROWS[dtype]:
        return f"it reads pages of whole tiles: page_size must be a multiple of {_ROWS[dtype]} for {dtype}"
    if isinstance(layout, PairedHeads) and 2 * layout.head_dim % _LANES:
        return f"it has no kernel for heads of {layout.head_dim} elements, only for multiples of {_LANES // 2}"
    return None


def attend(layout: TokenLayout, reach: Reach, *, interpret: bool = False) -> Attend:
    """See ``Backend``. ``interpret``: as JAX computes it anywhere, for tests."""
    if isinstance(layout, PaddedLatents):
        return functools.partial(_over_latents, layout, reach, interpret)
    return functools.partial(_by_head, layout, reach, interpret)


def read_bytes(layout: TokenLayout, reach: Reach, starts: NDArray[np.integer], newest: NDArray[np.integer]) -> int:
    """Bytes that the kernel reads of a layer's pool on the devices together.

    ``starts``, ``newest``: int [tiles], the positions of each tile's first and last token; -1 for padding.
    """
    first = np.asarray(reach.first(jnp.asarray(starts))) // layout.page_size
    pages = np.where(newest >= 0, newest // layout.page_size - first + 1, 0)
    return int(pages.sum()) * sum(a.size * a.dtype.itemsize for a in layout.buffers(1))


def _by_head(
    layout: TokenLayout, reach: Reach, interpret: bool, q: Array, k: Array, v: Array, sinks: Array,
    tables: Array, rows: Array, positions: Array, *buffers: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """Heads of whole lanes are cut off the row; of narrower ones the row is key and value at once.

    There the other half of a query is zero, and of a sum it is dropped: products cost the same, and nothing is moved.
    """
    (pool,) = write(layout, buffers, (k, v), tables, rows, positions)
    tiles, (kv_heads, dim) = len(rows), k.shape[1:]
    tile, cut = len(q) // tiles, dim % _LANES == 0
    if not cut:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, dim)))
    lanes = (0, dim, dim) if cut else (0, 0, 2 * dim)
    q, sinks = by_kv_head(q, kv_heads, tiles), sinks_by_kv_head(sinks, kv_heads, tile)
    out = by_token(_attend(reach, interpret, lanes, q, sinks, tables, rows, positions, pool), tile)
    return out if cut else out[..., dim:], pool


def _over_latents(
    layout: TokenLayout, reach: Reach, interpret: bool, q: Array, latents: Array,
    tables: Array, rows: Array, positions: Array, *buffers: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """One head, whose values are its keys.

    A tile of prefill has as many queries as it has tokens and heads together: it is cut by heads into several, each of
    which reads the pages for itself.
    """
    (pool,) = write(layout, buffers, (latents,), tables, rows, positions)
    (n, heads, dim), width = q.shape, pool.shape[-1]
    tile = n // len(rows)
    cuts = max(1, min(heads, tile * heads // _MOST_QUERIES))
    cuts = next(each for each in range(cuts, 0, -1) if heads % each == 0)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, width - dim)))
    q = q.reshape(len(rows), tile, cuts, -1, width).transpose(0, 2, 1, 3, 4).reshape(len(rows) * cuts, 1, -1, width)
    none = jnp.full(q.shape[1:3], -jnp.inf)
    where = jnp.repeat(rows, cuts), jnp.repeat(positions.reshape(-1, tile), cuts, axis=0).reshape(-1)
    out = _attend(reach, interpret, (0, 0, width), q, none, tables, *where, pool[:, None])
    out = out.reshape(len(rows), cuts, tile, heads // cuts, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(n, heads, width)[..., :dim], pool


def _attend(reach: Reach, interpret: bool, *arguments: Array | tuple[int, int, int]) -> Array:
    from rootcellar.ops.paged import attend  # Pallas takes a while to import, and is for TPUs alone

    return attend(reach, interpret, *arguments)
