"""Ids for what is no token, and the spans of a prompt where it stands: the positions that a picture takes, say.

Of an *atomic* span each place sees all the others, so its keys and values are of the whole: no chunk ends inside one,
and no request resumes inside one, whatever pages the cache still has of it. Another is cut like text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ABOVE = 1 << 62
"""Above every vocabulary, and above whatever fits 32 bits, so that no token is ever called so."""


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [start, stop) of a prompt, where a picture stands.

    ``content``: a digest of what it shows and how it is encoded. ``pixels``: what is encoded, uint8 [height, width, 3].
    ``token``: what stands for each position where people read the prompt. ``atomic``: see above.
    """

    start: int
    stop: int
    content: bytes
    pixels: NDArray[np.uint8] = field(compare=False, repr=False)
    token: int
    atomic: bool = False


def placeholder_ids(content: bytes, count: int) -> NDArray[np.int64]:
    """The ids of ``count`` positions that stand for one piece of content, int64 ``[count]``.

    They follow from the ``content`` (a digest of what was given and how it is encoded) and the position inside it, 62
    bits each: the cache shares what is equal, and takes nothing else for it. A longer run begins with the shorter one.
    """
    bits = hashlib.shake_256(b"rootcellar.placeholder.v1" + content).digest(8 * count)
    return np.frombuffer(bits, "<i8").astype(np.int64) & (ABOVE - 1) | ABOVE


def tokens_only(ids: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.int64]:
    """``ids`` of a prompt for people: with the span's token in the place of each id that is none."""
    shown = ids.copy()
    for span in spans:
        shown[span.start : span.stop] = span.token
    return shown


def image_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Where ids are no tokens: start and length of each run of them. Images next to each other are one run."""
    runs: list[tuple[int, int]] = []
    for i, id in enumerate(ids):
        if id < ABOVE:
            continue
        if runs and sum(runs[-1]) == i:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((i, 1))
    return runs


def outside(spans: Sequence[Span], at: int) -> int:
    """``at``, or the start of the atomic span that it lies inside of."""
    return next((span.start for span in spans if span.atomic and span.start < at < span.stop), at)
