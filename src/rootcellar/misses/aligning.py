"""What two prompts have alike behind the place where they part, in runs of tokens, and whether in one order."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rootcellar.misses.past import common

WINDOW = 16
"""Fewer tokens that are alike may be so by chance, or because a template says so."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Stretch:
    """``length`` tokens that are alike: from ``old`` on in the earlier prompt, from ``new`` on in the newer one."""

    old: int
    new: int
    length: int


def runs(old: NDArray[np.int64], new: NDArray[np.int64], start: int) -> list[Stretch]:
    """The runs behind ``start``, where the prompts differ, in the order of the newer one; none overlap there."""
    found: list[Stretch] = []
    begun, ids, ours = start, _windows(old[start:]), _windows(new[start:])
    known, first, times = np.unique(ids, return_index=True, return_counts=True)
    known, first = known[times == 1], first[times == 1]  # what stands there twice says nothing of the order
    if not len(known) or not len(ours):
        return []
    places = np.searchsorted(known, ours).clip(max=len(known) - 1)
    hits = np.flatnonzero(known[places] == ours)
    for i in hits.tolist():
        n, o = start + i, start + int(first[places[i]])
        if n < begun:
            continue
        length = common(old[o:], new[n:])
        if length < WINDOW:
            continue  # two windows of one number
        back = _back(old[start:o], new[begun:n])
        found.append(Stretch(o - back, n - back, length + back))
        begun = n + length
    return found


def _back(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many tokens two pieces end with alike."""
    return common(a[::-1], b[::-1])


def _windows(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for each ``WINDOW`` tokens in a row; equal ones have equal numbers."""
    count = len(tokens) - WINDOW + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    words = tokens.astype(np.uint64) + np.uint64(1)
    sums = np.zeros(count, np.uint64)
    for i in range(WINDOW):
        sums = sums * _FACTOR + words[i : i + count]
    return sums


def in_order(found: list[Stretch]) -> list[Stretch]:
    """The longest part of ``found`` (by runs) that stands in the order of the earlier prompt too."""
    ends: list[int] = []
    last: list[int] = []
    before: list[int | None] = []
    for i, run in enumerate(found):
        at = bisect_left(ends, run.old)
        before.append(last[at - 1] if at else None)
        ends[at : at + 1] = [run.old]
        last[at : at + 1] = [i]
    kept: list[Stretch] = []
    at_last = last[-1] if last else None
    while at_last is not None:
        kept.append(found[at_last])
        at_last = before[at_last]
    return kept[::-1]
