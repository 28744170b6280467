"""Objects: an image with a seal behind it, by which whoever reads it knows that it is what its name says.

Behind it: so an image begins where a page of memory, or of a file, does, and is copied sooner.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from rootcellar.tiers import NATIVE

if TYPE_CHECKING or NATIVE:
    from rootcellar.tiers import _slots

SEAL = struct.Struct("<8sQQ8x")
"""What it is, the image's length, a checksum over name, length and bytes."""
_MAGIC = b"rcimage2"
_PIECE = 1 << 17
"""Bytes that Python copies and adds to a checksum at a time, which caches of processors hold."""
_SHORTEST = 241
"""Bytes of an image that C++ sums up."""
_LINE, _PAGE = 64, 4096
"""Bytes of a line of a processor's cache, and of a page of memory."""
_LONG = 16 * _PAGE
"""Bytes of an object from which on those of a call begin at a page: a processor may take a third longer to copy what
the system has at the beginning of a page to a few lines behind another's (measured: Zen 3, from a socket)."""


class Scratch:
    """Memory for the objects of one call at a time; ``shown``: whether the store knows it.

    Some stores keep for ever what they were shown, so few are made: their sizes are powers of two, and as many are kept
    as calls may be under way at once.
    """

    def __init__(self, nbytes: int) -> None:
        # NumPy asks for large pages, of which the system copies a sixth faster than of what ``mmap`` shares.
        size = 1 << max(nbytes - 1, (1 << 20) - 1).bit_length()
        memory = np.empty(size + _PAGE, np.uint8)
        start = -memory.ctypes.data % _PAGE
        self.memory = memory[start : start + size].data
        self.shown = False

    def split(self, lengths: Sequence[int]) -> list[memoryview]:
        """Views of so many bytes, one behind the other. They need :func:`room`."""
        starts = accumulate(_places(lengths), initial=0)
        return [self.memory[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def room(lengths: Sequence[int]) -> int:
    """Bytes that :meth:`Scratch.split` needs for these."""
    return sum(_places(lengths))


def _places(lengths: Sequence[int]) -> list[int]:
    unit = _PAGE if max(lengths, default=0) >= _LONG else _LINE
    return [-(-length // unit) * unit for length in lengths]


class Made:
    """How many objects of a call are sealed, for the thread that sends them."""

    def __init__(self) -> None:
        self._count, self._over = 0, False
        self._more = threading.Condition()

    def by(self, steps: Iterable[int]) -> None:
        """Seal them: each step says how many are by then. Whoever waits hears of what goes wrong."""
        try:
            for count in steps:
                self._tell(count, over=False)
        finally:
            self._tell(self._count, over=True)

    def wait(self, count: int) -> None:
        """Until so many are sealed. Raises ``RuntimeError``: they never will."""
        with self._more:
            self._more.wait_for(lambda: self._count >= count or self._over)
            if self._count < count:
                raise RuntimeError("what is sent could not be summed up")

    def _tell(self, count: int, *, over: bool) -> None:
        with self._more:
            self._count, self._over = count, over
            self._more.notify()


def seals_of(names: Sequence[bytes], images: Sequence[memoryview], into: Sequence[memoryview] = ()) -> list[bytes]:
    """The seals of objects, whose images are copied by the way, each to its ``into`` where there are any.

    What they are true of is the copy: the image may be written meanwhile.
    """
    lengths = [len(image) for image in images]
    pairs = zip(names, lengths, strict=True)
    seeds = [xxhash.xxh3_64_intdigest(_MAGIC + length.to_bytes(8, "little") + name) for name, length in pairs]
    if NATIVE and min(lengths, default=0) >= _SHORTEST:
        sums = _slots.sums(list(images), seeds, list(into))
    else:
        sums = [_sum(image, seed, place) for image, seed, place in zip_longest(images, seeds, into)]
    return [SEAL.pack(_MAGIC, length, checksum) for length, checksum in zip(lengths, sums, strict=True)]


def unseal(names: Sequence[bytes], objects: Sequence[memoryview], into: Sequence[memoryview]) -> list[bool]:
    """Copy the images of objects to ``into``; which of them are the pages of these names, whole."""
    seals = seals_of(names, [made[: -SEAL.size] for made in objects], into)
    return [made[-SEAL.size :] == sealed for made, sealed in zip(objects, seals, strict=True)]


def _sum(image: memoryview, seed: int, into: memoryview | None) -> int:
    """What C++ does, a piece at a time, slowly."""
    checksum = xxhash.xxh3_64(seed=seed)
    for start in range(0, len(image), _PIECE):
        piece = image[start : start + _PIECE]
        if into is not None:
            into[start : start + _PIECE] = piece
            piece = into[start : start + _PIECE]  # which nobody else writes
        checksum.update(piece)
    return checksum.intdigest()
