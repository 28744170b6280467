"""What computing a prompt's tokens took: time of steps is parted, and what was not measured is estimated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Terms of ``PrefillCost``.
_TERMS = 3
_ROUNDS = 4
# A part of the time by which steps differ anyhow.
_NOISE = 0.02


class Spent(NamedTuple):
    """Tokens [start, stop) of a prompt were computed in so many seconds."""

    start: int
    stop: int
    seconds: float


class StepsTaken(NamedTuple):
    """Steps that were waited for together: how many, their tokens and what fills them up, pairs, and seconds."""

    steps: int
    tokens: int
    pairs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds that a step of prefill takes: for itself, for each token, and for each pair of one and an earlier one.

    All 0: nothing is known. ``sizes``: tokens that a step may have, ascending: it is filled up to the next of them, and
    what fills it up takes as long as any token.
    """

    step: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    sizes: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return self.token > 0 or self.pair > 0

    def of(self, start: int, stop: int) -> float:
        """Seconds for tokens [start, stop) of a prompt in one step, those for the step itself among them."""
        return self.step + self.token * filled(stop - start, self.sizes) + self.pair * pairs(start, stop)

    def price(self, start: int, stop: int, spent: Iterable[Spent]) -> float | None:
        """Seconds that [start, stop) took, by what was ``spent``; None where nothing is known.

        What follows in the step that reached ``stop`` would have needed a step of its own: that is not in the price.
        """
        seconds, known = 0.0, 0
        for begin, end, took in spent:
            first, last = max(start, begin), min(stop, end)
            if first >= last:
                continue
            known += last - first
            if (first, last) == (begin, end):
                seconds += took
            elif self:
                before = self.token * (first - begin) + self.pair * pairs(begin, first)
                after = self.of(last, end) if last < end else 0.0
                seconds += took * max(0.0, 1 - (before + after) / self.of(begin, end))
            else:
                seconds += took * (last - first) / (end - begin)
        left = stop - start - known
        if left <= 0:
            return seconds
        if not self:
            return seconds or None
        return seconds + self.token * left + self.pair * pairs(stop - left, stop)


UNKNOWN = PrefillCost()
"""Nothing is known."""


def pairs(start: int, stop: int) -> int:
    """Pairs of one of the tokens [start, stop) and an earlier one."""
    return (stop - start) * (start + stop - 1) // 2


def filled(tokens: int, sizes: Sequence[int]) -> int:
    """Tokens of a step that has so many to compute: the next of ``sizes``, or as many beyond the last."""
    at = bisect_left(sizes, tokens)
    return sizes[at] if at < len(sizes) else tokens


def learned(measured: Sequence[StepsTaken], sizes: tuple[int, ...] = ()) -> PrefillCost:
    """What such steps, of such ``sizes``, take: the terms, none below 0, that are least off, in parts of the seconds.

    Least absolute deviations, as weighted least squares again and again (Schlossmacher, 1973): a step that compiled, or
    that the machine was busy in, says nothing of the others. O(steps).
    """
    rows = np.array([each for each in measured if each.seconds > 0], np.float64).reshape(-1, _TERMS + 1)
    if not len(rows):
        return PrefillCost(sizes=sizes)
    parts = rows[:, :_TERMS] / rows[:, _TERMS:]
    weights, found = np.ones(len(parts)), np.zeros(_TERMS)
    for _ in range(_ROUNDS):
        found = _least(parts, weights)
        weights = 1 / np.maximum(np.abs(parts @ found - 1), _NOISE)
    step, token, pair = found.tolist()
    return PrefillCost(step, token, pair, sizes)


def _least(parts: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The terms, none below 0, with which ``parts`` of each row sum to 1 as nearly as can be, by weighted squares.

    Every choice of terms is tried (Lawson and Hanson, 1974, need fewer, of many).
    """
    scale: NDArray[np.float64] = np.maximum(np.abs(parts).max(axis=0), 1e-30)  # pairs are many
    scaled = parts / scale
    square, right = (scaled.T * weights) @ scaled, scaled.T @ weights
    best = np.inf
    found: NDArray[np.float64] = np.zeros(_TERMS)
    for count in range(1, _TERMS + 1):
        for chosen in combinations(range(_TERMS), count):
            terms = np.zeros(_TERMS)
            terms[list(chosen)] = np.linalg.lstsq(square[np.ix_(chosen, chosen)], right[list(chosen)], rcond=1e-9)[0]
            off = float(terms @ square @ terms - 2 * terms @ right)
            if terms.min() >= 0 and off < best - 1e-12:
                best, found = off, terms
    return found / scale
