"""Pages whose bytes follow from their names, so that nobody has to remember what was put."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from rootcellar.tiers.store import Store

_TILE = 1 << 16


@functools.lru_cache(8192)
def name(i: int) -> bytes:
    """The name of page ``i``."""
    return hashlib.sha256(b"name %d" % i).digest()


@functools.lru_cache(4096)
def _tile(i: int, nbytes: int) -> bytes:
    return np.random.default_rng([i, nbytes]).bytes(min(nbytes, _TILE))


def image(i: int, nbytes: int = 5000) -> memoryview:
    """The only bytes that may ever be returned for ``name(i)``; not to be changed."""
    tile = _tile(i, nbytes)
    return memoryview(tile if len(tile) == nbytes else (tile * (nbytes // len(tile) + 1))[:nbytes])


def room(nbytes: int = 5000) -> memoryview:
    """Memory for an image, which holds something else."""
    return memoryview(bytearray(b"\xaa" * nbytes))


def get(store: Store, i: int, nbytes: int = 5000) -> bool:
    """Whether the page is there; it is right then."""
    into = room(nbytes)
    (found,) = store.get([name(i)], [into])
    assert not found or into == image(i, nbytes), f"wrong bytes for page {i}"
    return found


def put(store: Store, pages: Sequence[int], nbytes: int = 5000) -> list[bool]:
    """Put these pages in one call."""
    return store.put([name(i) for i in pages], [image(i, nbytes) for i in pages])
