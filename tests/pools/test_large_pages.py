"""Large pages: which addresses are asked for, and that nothing but the pages changes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.pools.large_pages import SIZE, in_large_pages, large


def test_whole_pages_within_spans_that_nearly_touch() -> None:
    assert large([]) == []
    assert large([(1, SIZE)]) == []  # no whole page lies there
    assert large([(0, SIZE - 8), (SIZE, SIZE)]) == [(0, 2 * SIZE)]
    assert large([(SIZE - 1, 2 * SIZE), (9 * SIZE, 2 * SIZE + 5)]) == [(SIZE, 2 * SIZE), (9 * SIZE, 11 * SIZE)]
    assert large([(0, 4 * SIZE), (SIZE, 1)]) == [(0, 4 * SIZE)]  # one within another


def _in_large_pages_now() -> int:
    said = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in said if line.startswith("AnonHugePages"))


def test_what_is_allocated_moves_and_keeps_its_values() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages to give")
    before = _in_large_pages_now()
    arrays = [jnp.arange(i, (4 << 20) + i) for i in range(4)]  # of 16 MiB
    jax.block_until_ready(arrays)
    alive = len(jax.live_arrays())
    in_large_pages([*arrays, jnp.zeros(3)])
    assert len(jax.live_arrays()) == alive
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(array, np.arange(i, (4 << 20) + i))
    if _in_large_pages_now() - before < 32 << 20:
        pytest.skip("this system moves what is allocated by and by (Linux before 6.1), or has no memory in one piece")
