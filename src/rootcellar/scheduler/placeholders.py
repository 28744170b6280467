"""Ids for what is no token: the positions of a prompt that an image, say, takes."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ABOVE = 1 << 62
"""Above every vocabulary, and above whatever fits 32 bits, so that no token is ever called so."""


def placeholder_ids(content: bytes, count: int) -> NDArray[np.int64]:
    """The ids of ``count`` positions that stand for one piece of content, int64 ``[count]``.

    They follow from the ``content`` (a digest of what was given and how it is encoded) and the position inside it, 62
    bits each: the cache shares what is equal, and takes nothing else for it. A longer run begins with the shorter one.
    """
    bits = hashlib.shake_256(b"rootcellar.placeholder.v1" + content).digest(8 * count)
    return np.frombuffer(bits, "<i8").astype(np.int64) & (_ABOVE - 1) | _ABOVE
