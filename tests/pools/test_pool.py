"""Pools: exact bytes, freed at once, allocated again without compiling."""

import jax
import jax.numpy as jnp
import pytest

from rootcellar.errors import ConfigError, EngineError
from rootcellar.plan.stored import Heads, Latents, Routes, States
from rootcellar.pools import Pool
from rootcellar.pools.layouts import LAYOUTS, PagedHeads, layout_of, page_bytes
from rootcellar.runner import CompileCounter


def test_bytes_are_what_the_layout_says():
    # Qwen2.5-3B over 4 devices (heads replicated to 4), bfloat16, page size 1: what was measured on a TPU v4-8.
    layout = PagedHeads(4, 128, jnp.dtype(jnp.bfloat16), 1)
    assert page_bytes(layout) * 36 == 73_728
    assert 36 * 32_769 * page_bytes(layout) == 2_415_992_832


STORED = {
    "heads": Heads(2, 16),
    "latents": Latents(24, 8),
    "states": States((3, 40), (4, 8, 5)),
    "routes": Routes(3, 2, 300),
}


@pytest.mark.parametrize(("form", "dtype"), sorted(LAYOUTS))
def test_a_layout_takes_what_is_stored_times_the_width_of_an_element(form, dtype):
    """What the planner counts with, which cannot ask a layout."""
    stored = STORED[form]
    expected = 16 * stored.token_bytes(dtype) + stored.request_bytes(dtype)
    layout = layout_of(stored, dtype, 16)
    assert page_bytes(layout) == expected
    assert len(layout.axes) == len(layout.buffers(1))


def test_a_type_without_a_layout_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int4' has no layout of heads: choose from float32"):
        layout_of(STORED["heads"], "int4", 16)


def test_free_gives_the_memory_back_and_allocate_compiles_nothing():
    pool = Pool(PagedHeads(2, 64, jnp.dtype(jnp.float32), 16), layers=3, pages=4)
    buffers = jax.tree.leaves(pool.buffers)
    assert [b.shape for b in buffers] == [(5, 2, 2, 16, 64)] * 3
    assert pool.nbytes == sum(b.nbytes for b in buffers)
    assert pool.free() == pool.nbytes
    assert all(b.is_deleted() for b in buffers)
    assert pool.free() == 0
    with pytest.raises(EngineError, match="not allocated"):
        _ = pool.buffers
    compiles = CompileCounter()
    pool.allocate()
    assert compiles.count == 0
    assert float(jnp.sum(jax.device_get(pool.buffers[0][0]))) == 0
