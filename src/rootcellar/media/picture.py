"""A picture as models get it."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture shows. Two are equal when they show the same, whatever files they came in.

    ``pixels``: uint8 [height, width, 3], red, green and blue, upright, without transparency; read-only and contiguous.
    ``digest``: 32 bytes, SHA-256 over height and width (uint32, little-endian) and the pixels. ``prepared``: whether
    ``pixels`` are what a model's encoder made of these, and ``digest`` nevertheless that of the whole picture.
    """

    pixels: NDArray[np.uint8] = field(compare=False, repr=False)
    digest: bytes
    prepared: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> Self:
        """The picture of these pixels, uint8 [height, width, 3]; they become read-only where they need no copy."""
        pixels = np.ascontiguousarray(pixels)
        pixels.flags.writeable = False
        return cls(pixels, digest_of(pixels))

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[1])


def digest_of(pixels: NDArray[np.uint8]) -> bytes:
    """32 bytes: SHA-256 over height and width and contiguous pixels, uint8 [height, width, 3].

    The size is part of it: the same pixels in other rows are another picture.
    """
    whole = hashlib.sha256(struct.pack("<II", *pixels.shape[:2]))
    whole.update(pixels.data)
    return whole.digest()
