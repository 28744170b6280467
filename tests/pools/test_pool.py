"""Pools: exact bytes, freed at once, allocated again without compiling."""

import jax
import jax.numpy as jnp
import pytest

from rootcellar.errors import EngineError
from rootcellar.pools import PagedKV, Pool
from rootcellar.runner import CompileCounter


def test_bytes_are_what_the_layout_says():
    # Qwen2.5-3B over 4 devices (heads replicated to 4), bfloat16, page size 1: what was measured on a TPU v4-8.
    layout = PagedKV(4, 128, jnp.dtype(jnp.bfloat16))
    assert layout.bytes_per_token * 36 == 73_728
    shape = layout.shape(32_769, 1)
    assert 36 * shape[0] * shape[1] * shape[2] * shape[3] * shape[4] * 2 == 2_415_992_832


def test_free_gives_the_memory_back_and_allocate_compiles_nothing():
    pool = Pool(PagedKV(2, 64, jnp.dtype(jnp.float32)), layers=3, tokens=64, page_size=16)
    assert [b.shape for b in pool.buffers] == [(5, 2, 2, 16, 64)] * 3
    assert pool.nbytes == sum(b.nbytes for b in pool.buffers)
    buffers = pool.buffers
    assert pool.free() == pool.nbytes
    assert all(b.is_deleted() for b in buffers)
    assert pool.free() == 0
    with pytest.raises(EngineError, match="not allocated"):
        _ = pool.buffers
    compiles = CompileCounter()
    pool.allocate()
    assert compiles.count == 0
    assert float(jnp.sum(jax.device_get(pool.buffers[0]))) == 0
