"""Weights in the large pages of a CPU's memory.

Linux gives memory in pages of 4 KiB unless it is asked; a processor looks each up and fetches ahead only within one.
With pages of 2 MiB, products with few rows, which are as fast as weights can be read, take a seventh less time. Only
what was allocated is asked for: no memory is added, and no value changes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import numpy as np
from jax import Array

SIZE = 2 << 20
"""Bytes of a large page."""
_LEAST = 64 << 10
"""Bytes of arrays worth looking at, and of gaps between them that are filled."""
_WANTED = 14
"""``MADV_HUGEPAGE``."""
_NOW = 25
"""``MADV_COLLAPSE``, which Linux has since 6.1: what lies there already moves, too."""


def in_large_pages(arrays: Iterable[Array]) -> None:
    """Ask for large pages under ``arrays``, as far as they lie in this process's memory.

    Nothing happens where the system has none: it is a wish. Arrays on several devices, and those of types that NumPy
    does not know by itself (bfloat16), are left as they are: JAX makes a second array of one whose address is asked
    for, and keeps it as long, so that what is allocated would be counted twice.
    """
    if not sys.platform.startswith("linux"):
        return
    spans = sorted((np.asarray(array).ctypes.data, array.nbytes) for array in arrays if _here(array))
    for start, end in large(spans):
        for advice in (_WANTED, _NOW):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _here(array: Array) -> bool:
    known = array.dtype.isbuiltin == 1
    return known and array.nbytes >= _LEAST and [device.platform for device in array.devices()] == ["cpu"]


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
