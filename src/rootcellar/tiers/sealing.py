"""Objects: an image with a seal behind it, by which whoever reads it knows that it is what its name says.

Behind it: so an image begins where a page of memory, or of a file, does, and is copied sooner.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import xxhash

SEAL = struct.Struct("<8sQQ8x")
"""What it is, the image's length, a checksum over name, length and bytes."""
_MAGIC = b"rcimage2"
_PIECE = 1 << 17
"""Bytes that are copied and added to a checksum at a time, which caches of processors hold."""


class Scratch:
    """Memory for the objects of one call at a time; ``shown``: whether the store knows it.

    Some stores keep for ever what they were shown, so few are made: their sizes are powers of two, and as many are kept
    as calls may be under way at once.
    """

    def __init__(self, nbytes: int) -> None:
        # NumPy asks for large pages, of which the system copies a sixth faster than of what ``mmap`` shares.
        self.memory = np.empty(1 << max(nbytes - 1, (1 << 20) - 1).bit_length(), np.uint8).data
        self.shown = False

    def split(self, lengths: Sequence[int]) -> list[memoryview]:
        """Views of so many bytes, one behind the other."""
        ends = list(accumulate(lengths))
        return [self.memory[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def seal(name: bytes, image: memoryview, into: memoryview | None = None) -> bytes:
    """The seal of an object, whose image is copied to ``into`` by the way."""
    length = len(image)
    checksum = xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(_MAGIC + length.to_bytes(8, "little") + name))
    for start in range(0, length, _PIECE):
        piece = image[start : start + _PIECE]
        if into is not None:
            into[start : start + _PIECE] = piece
            piece = into[start : start + _PIECE]  # which nobody else writes
        checksum.update(piece)
    return SEAL.pack(_MAGIC, length, checksum.intdigest())


def unseal(name: bytes, made: memoryview, into: memoryview) -> bool:
    """Copy the image of an object to ``into``; whether it is the page of this name, whole."""
    return made[-SEAL.size :] == seal(name, made[: -SEAL.size], into)
