"""Buffers in the large pages of a CPU's memory.

Linux gives memory in pages of 4 KiB unless it is asked; a processor looks each up and fetches ahead only within one.
Only what was allocated is asked for: no memory is added, and no value changes. (Products with weights would take a
seventh less time so, too. But JAX counts an array that came from the host twice once its address was asked for, and
what is allocated is to be known to the byte.)
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from jax import Array

SIZE = 2 << 20
"""Bytes of a large page."""
_LEAST = 64 << 10
"""Bytes of arrays worth looking at, and of gaps between them that are filled."""
_WANTED, _NOW = (
    14,
    25,
)  # MADV_HUGEPAGE, and MADV_COLLAPSE, which Linux has since 6.1: what lies there already moves, too


def in_large_pages(arrays: Iterable[Array]) -> None:
    """Ask for large pages under ``arrays``, as far as they lie in this process's memory.

    Nothing happens where the system has none: it is a wish. Arrays on several devices are left as they are: to look at
    a part of one makes an array that lives as long.
    """
    if not sys.platform.startswith("linux"):
        return
    spans = sorted(
        (array.unsafe_buffer_pointer(), array.nbytes)
        for array in arrays
        if array.nbytes >= _LEAST and [device.platform for device in array.devices()] == ["cpu"]
    )
    for start, end in large(spans):
        for advice in (_WANTED, _NOW):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def large(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Whole large pages ``(start, end)`` in ``spans`` (address, bytes), sorted; those that nearly touch are one."""
    joined: list[list[int]] = []
    for start, nbytes in spans:
        if joined and start - joined[-1][1] <= _LEAST:
            joined[-1][1] = max(joined[-1][1], start + nbytes)
        else:
            joined.append([start, start + nbytes])
    whole = ((-(-start // SIZE) * SIZE, end // SIZE * SIZE) for start, end in joined)
    return [(start, end) for start, end in whole if start < end]
