"""Objects: an image with a seal behind it, by which whoever reads it knows that it is what its name says.

Behind it: so an image begins where a page of memory, or of a file, does, and is copied sooner.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
_LINE = 64
"""Bytes of a line of a processor's cache, to which memory is aligned."""


class Scratch:
    """Memory for the objects of one call at a time; ``shown``: whether the store knows it.

    Some stores keep for ever what they were shown, so few are made: their sizes are powers of two, and as many are kept
    as calls may be under way at once.
    """

    def __init__(self, nbytes: int) -> None:
        # NumPy asks for large pages, of which the system copies a sixth faster than of what ``mmap`` shares.
        size = 1 << max(nbytes - 1, (1 << 20) - 1).bit_length()
        memory = np.empty(size + _LINE, np.uint8)
        start = -memory.ctypes.data % _LINE
        self.memory = memory[start : start + size].data
        self.shown = False

    def split(self, lengths: Sequence[int]) -> list[memoryview]:
        """Views of so many bytes, one behind the other."""
        ends = list(accumulate(lengths))
        return [self.memory[end - length : end] for end, length in zip(ends, lengths, strict=True)]


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
