"""Large pages: which addresses are asked for, and that nothing but the pages changes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alive import alive
from rootcellar.runner.large_pages import SIZE, in_large_pages, large


def test_whole_pages_within_spans_that_nearly_touch() -> None:
    assert large([]) == []
    assert large([(1, SIZE)]) == []  # no whole page lies there
    assert large([(0, SIZE - 8), (SIZE, SIZE)]) == [(0, 2 * SIZE)]
    assert large([(SIZE - 1, 2 * SIZE), (9 * SIZE, 2 * SIZE + 5)]) == [(SIZE, 2 * SIZE), (9 * SIZE, 11 * SIZE)]
    assert large([(0, 4 * SIZE), (SIZE, 1)]) == [(0, 4 * SIZE)]  # one within another


def _wanted_under(address: int) -> bool:
    """Whether the system knows the wish for the memory at ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (ends := line.split(maxsplit=1)[0]) and ":" not in ends:
            start, end = (int(each, 16) for each in ends.split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no memory at {address:#x}")


def test_what_is_allocated_is_asked_for_and_counts_once() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system knows no large pages")
    values = np.arange(4 << 20, dtype=np.float32)  # 16 MiB
    arrays = [jax.device_put(values + i) for i in range(3)]
    jax.block_until_ready(arrays)
    before = sum(array.nbytes for array in alive())
    in_large_pages([*arrays, jnp.zeros(3), jnp.zeros((1 << 20,), jnp.bfloat16)])
    assert sum(array.nbytes for array in alive()) <= before
    for i, array in enumerate(arrays):
        assert _wanted_under(array.unsafe_buffer_pointer() + SIZE)
        np.testing.assert_array_equal(array, values + i)
