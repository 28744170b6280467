"""Paged attention: write a packed batch's keys and values into the pool, and attend to each row's pages.

The batch is a flat list of tokens, cut into *tiles*: equally many consecutive positions of one row, padding (position
-1) last. Decoding is the case of one token a tile. Two backends compute the same function:

* ``xla``: plain JAX, for any device. Blocks of pages are gathered in a loop whose length is the longest row's, so one
  compiled step serves every context length.
* ``native``: C++ behind XLA's foreign-function interface, for CPUs (``native/paged_attention.cc``). It works on the
  pool in place.

Both take and give back the pool, which the caller donates: a step never copies it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from rootcellar import ops
from rootcellar.errors import ConfigError
from rootcellar.ops.pages import BLOCK_TOKENS, MASKED, padded, places

log = logging.getLogger(__name__)

Attention = Callable[[Array, Array, Array, Array, Array, Array, Array, Array], tuple[Array, Array]]

_LIBRARY = "_native.so"
_TARGET = "rootcellar_paged_attention"
_NOT_BUILT = "the package was installed without a C++ compiler, or ROOTCELLAR_NO_NATIVE=1 is set"


@dataclass(frozen=True)
class Reach:
    """What a query sees, and the ``scale`` of its scores. ``rule`` and ``span`` (tokens) as in the cache's ``Kind``."""

    rule: Literal["full", "sliding_window", "chunked_local"] = "full"
    span: int = 0
    scale: float = 1.0

    def first(self, query: Array) -> Array:
        """The first position that queries at positions ``query`` (int32, any shape) see."""
        if self.rule == "sliding_window":
            return jnp.maximum(query - (self.span - 1), 0)
        if self.rule == "chunked_local":
            return jnp.maximum(query, 0) // self.span * self.span
        return jnp.zeros_like(query)

    def sees(self, query: Array, key: Array) -> Array:
        """Whether positions ``query`` see positions ``key``; bool, the two broadcast together."""
        return (key <= query) & (key >= self.first(query))


@functools.cache
def _native_library() -> ctypes.CDLL | None:
    """The shared library with the CPU kernel, registered with XLA; None where it was not built or is not wanted."""
    if os.environ.get("ROOTCELLAR_NO_NATIVE") == "1":
        return None
    # An editable install keeps what was compiled apart from the sources; the package's path knows both places.
    found = [file for folder in ops.__path__ if (file := Path(folder) / _LIBRARY).exists()]
    if not found:
        log.info("no native attention kernel (%s was not built): attention runs through XLA", _LIBRARY)
        return None
    library = ctypes.CDLL(str(found[0]))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.RootcellarPagedAttention), platform="cpu")
    return library


def choose_backend(wanted: str, head_dims: Iterable[int], dtype: jnp.dtype, platform: str) -> str:
    """Which backend runs: ``"native"`` or ``"xla"``.

    Args:
        wanted: the setting ``attention_backend``: ``"auto"``, ``"native"`` or ``"xla"``.
        head_dims: elements per head, of all layers that would use the native kernel.
        dtype: of the pool.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    Raises:
        ConfigError: ``"native"`` was asked for and cannot run; the message says why.
    """
    if wanted == "xla":
        return "xla"
    why = None
    if platform != "cpu":
        why = f"it runs on CPUs, and the device is a {platform}"
    elif dtype not in (jnp.float32, jnp.bfloat16):
        why = f"it reads float32 and bfloat16 pools, and kv_cache_dtype is {dtype}"
    else:
        library = _native_library()
        if library is None:
            why = _NOT_BUILT
        else:
            lacking = [head_dim for head_dim in head_dims if not library.rootcellar_has_kernel(head_dim)]
            if lacking:
                why = f"it has no kernel for head_dim {lacking[0]}"
    if why is None:
        return "native"
    if wanted == "native":
        raise ConfigError(f"attention_backend='native' cannot be used: {why}. Use attention_backend='auto' or 'xla'.")
    return "xla"


def paged_attention(backend: str, reach: Reach) -> Attention:
    """The attention function of a backend, for queries that see what ``reach`` says.

    The function takes ``pool [pages, 2, kv_heads, page_size, head_dim]``, ``q [T, heads, head_dim]``,
    ``k`` and ``v`` ``[T, kv_heads, head_dim]``, float32 ``sinks [heads]`` (scores that take weight and give nothing;
    minus infinity for none), and int32 ``tables [R, W]`` (page of each run of ``page_size`` positions; those that no
    query sees may be 0), ``rows [tiles]`` (the table row of each tile), ``positions [T]`` (-1 for padding); ``T`` is a
    multiple of ``tiles``. It returns ``(out [T, heads, head_dim] float32, pool)``; rows of padding hold nothing of
    meaning.
    """
    if backend == "native" and _native_library() is None:
        raise ConfigError(f"attention_backend='native' cannot be used: {_NOT_BUILT}.")
    return functools.partial({"xla": _attend_xla, "native": _attend_native}[backend], reach)


def _attend_native(
    reach: Reach, pool: Array, q: Array, k: Array, v: Array, sinks: Array, tables: Array, rows: Array, positions: Array
) -> tuple[Array, Array]:
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


def write_pages(pool: Array, k: Array, v: Array, tables: Array, rows: Array, positions: Array) -> Array:
    """Write the keys and values of a packed batch into their pages; padding goes to page 0.

    Shapes and dtypes as in :func:`paged_attention`. Returns the pool.
    """
    pages, offsets = places(tables, rows, positions, pool.shape[3])
    kv = padded(jnp.stack([k, v], axis=1).astype(pool.dtype), pages)
    return pool.at[pages, :, :, offsets].set(kv)


def _attend_xla(
    reach: Reach, pool: Array, q: Array, k: Array, v: Array, sinks: Array, tables: Array, rows: Array, positions: Array
) -> tuple[Array, Array]:
    """Blockwise attention with an online softmax (Milakov and Gimelshein, 2018)."""
    pool = write_pages(pool, k, v, tables, rows, positions)
    _, _, kv_heads, page_size, head_dim = pool.shape
    n = rows.shape[0]
    tile = positions.shape[0] // n
    group = q.shape[1] // kv_heads
    per_block = max(1, BLOCK_TOKENS // page_size)
    block = per_block * page_size
    positions = positions.reshape(n, tile)
    q = q.reshape(n, tile, kv_heads, group, head_dim).astype(jnp.float32) * reach.scale
    # Each tile's blocks begin at the first page that its first token sees.
    first = reach.first(positions[:, 0]) // page_size
    pages_of = _block_of_pages(reach, tables, rows, first, per_block)
    newest = jnp.max(positions, axis=1)
    blocks = (jnp.max(newest - first * page_size) + block) // block

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        kv = pool[pages_of(i)].astype(jnp.float32)  # [n, per_block, 2, kv_heads, page_size, head_dim]
        # Slots that nobody has written for this row hold what an earlier owner left, which may be anything: a weight of
        # zero does not silence a NaN.
        at = (first[:, None] * page_size + i * block + jnp.arange(block)).reshape(n, per_block, page_size)
        written = at <= newest[:, None, None]
        v = jnp.where(written[:, :, None, :, None], kv[:, :, 1], 0.0)
        s = jnp.einsum("nthgd,nbhpd->nhgtbp", q, kv[:, :, 0]).reshape(n, kv_heads, group, tile, block)
        seen = reach.sees(positions[:, :, None], at.reshape(n, 1, block))  # [n, tile, block]
        s = jnp.where(seen[:, None, None], s, MASKED)
        new_top = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.where(seen[:, None, None], jnp.exp(s - new_top[..., None]), 0.0)
        keep = jnp.exp(top - new_top)
        values = jnp.einsum("nhgtbp,nbhpd->nhgtd", p.reshape(n, kv_heads, group, tile, per_block, page_size), v)
        return new_top, total * keep + jnp.sum(p, axis=-1), out * keep[..., None] + values

    shape = (n, kv_heads, group, tile)
    sinks = jnp.broadcast_to(sinks.reshape(kv_heads, group, 1), shape)
    start = (jnp.maximum(sinks, MASKED), jnp.where(sinks > MASKED, 1.0, 0.0), jnp.zeros((*shape, head_dim)))
    _, total, out = lax.fori_loop(0, blocks, body, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(n * tile, kv_heads * group, head_dim), pool


def _block_of_pages(reach: Reach, tables: Array, rows: Array, first: Array, per_block: int) -> Callable[[Array], Array]:
    """A function from a block's number to its pages, int32 [tiles, per_block], of each tile from ``first`` on."""
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % per_block)))[rows]
    if reach.rule == "full":  # every tile begins at 0: a slice is cheaper than a gather
        return lambda i: lax.dynamic_slice_in_dim(tables, i * per_block, per_block, axis=1)

    def pages_of(i: Array) -> Array:
        at = first[:, None] + i * per_block + jnp.arange(per_block)
        return jnp.take_along_axis(tables, at, axis=1, mode="fill", fill_value=0)

    return pages_of
