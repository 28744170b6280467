"""Guessing ahead: tokens that a request will probably say, because they stand somewhere already, verified in one step.

A step computes a request's newest token together with a *guess* of those that follow it, each at its own position, and
chooses the token after each of them. Those of the guess that were chosen before them are right: they are the answer's,
with one more behind them, and their keys and values are there. What is chosen is a function of what comes before and of
the request's seed and the position (``runner/sampler.py``), so a guess that is right is what would have been said
without it, greedy or drawn, and one that is wrong costs its place in the step.

Drawn tokens need no correction (Leviathan et al., 2023): a guess names one token, so to accept it when it is drawn, and
else to take what was drawn, *is* rejection sampling.

How much is guessed is a matter of prices. What steps of each size take is measured; how likely guesses are right is
counted, by the length of what matched, and of each request. The guesses of all are added, the likeliest first, as long
as tokens a second grow by it. Where that is at none, nothing is guessed (but what is counted fades, so that it is tried
again). A batch is padded to a power of two: what pads it may as well be guessed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import RadixCache, Suffixes, owner_of
from rootcellar.scheduler.placeholders import ABOVE
from rootcellar.scheduler.request import Request
from rootcellar.scheduler.snapshots import Snapshots

LOOK_BACK = 1 << 14
"""Of its own text, the newest tokens in which a request looks for its end."""
_FAIRLY = 0.5
"""How likely the next token of a guess is right, as long as nothing is known: for the shortest match."""
_SURELY = 0.9
"""The same for the longest."""
_BELIEF = 8.0
"""Guessed tokens that such a belief counts for; half as many, what is known of all requests for one of them."""
_MANY = 256.0
_MORE = 1.25
"""Times as long as half as many rows, rows are taken to take until that is known: a likely guess finds out."""
_FADE = 0.99
"""What is known of guesses counts so much less after each step that does not try them, whatever its rows."""
_MARGIN = 1.05
"""Times as many tokens a second as without it, a guess must promise: prices and chances are not known better."""
_REMEMBERED = 0.85


class Proposal(NamedTuple):
    """What stands where the last ``matched`` tokens of a request stand too: the tokens after them."""

    matched: int
    tokens: tuple[int, ...]


NOTHING = Proposal(0, ())


class Guesses(Protocol):
    """Says what decoding requests may say next."""

    def of(self, requests: Sequence[Request]) -> Sequence[tuple[int, ...]]:
        """For each request the tokens to verify after its newest; none is as good an answer as any."""

    def possible(self, rows: int) -> bool:
        """Whether the next step may have guesses, if so many requests decode in it, whatever they say until then."""

    def ended(self, request: Request) -> None:
        """A request that ran ended: this is all that it said."""

    def forget(self) -> None:
        """What is cached is flushed."""

    def took(self, tokens: int, seconds: float) -> None:
        """A decode step of so many tokens, guessed ones among them, took so long."""

    def verified(self, request: Request, guessed: int, right: int) -> None:
        """A decode step gave a request tokens: the first ``right`` of so many guessed ones, and one more."""


def keep(guess: Sequence[int], chosen: Sequence[int]) -> Sequence[int]:
    """Of the tokens chosen after a request's newest and after each of ``guess``, those that are its answer's."""
    right = 0
    while right < len(guess) and guess[right] == chosen[right]:
        right += 1
    return chosen[: right + 1]


def fitting(
    cache: RadixCache, request: Request, guess: tuple[int, ...], snapshots: Snapshots | None
) -> tuple[int, ...]:
    """A guess, with slots for its tokens; nothing where there are none: no request makes way for a guess.

    What is only cached does, as for a request's own tokens. A guess ends where a recurrent state would be left: there
    is none of a token in its midst.
    """
    if snapshots is not None:
        guess = guess[: snapshots.until(request) - 1]
    if guess and max(guess) >= ABOVE:  # what is no token is never said
        guess = guess[: next(i for i, token in enumerate(guess) if token >= ABOVE)]
    lacking = request.computed + 1 + len(guess) - request.slots
    if guess and lacking > 0:
        assert request.lease is not None
        if not cache.grow(request.lease, lacking, step=False):
            return ()
        request.slots += lacking
    return guess


def give_back(cache: RadixCache, request: Request) -> None:
    """Let go of slots for guessed tokens that were wrong, or came after the request's last."""
    if request.slots > request.computed:
        assert request.lease is not None
        cache.grow(request.lease, request.computed - request.slots)
        request.slots = request.computed


def repetition(ids: NDArray[np.int64], least: int, longest: int, most: int) -> Proposal:
    """What followed where the last tokens of ``ids`` stood before.

    Of all places at which at least ``least`` of the last tokens stand, that where most of them do, up to ``longest``;
    the newest of equals. Up to ``most`` tokens; where they reach the end of ``ids`` they go on from their beginning, as
    a repetition does. O(tokens), in numpy.
    """
    n = len(ids)
    if n <= least or most < 1:
        return NOTHING
    ends = np.flatnonzero(ids[least - 1 : n - 1] == ids[-1]) + (least - 1)
    for back in range(1, least):
        ends = ends[ids[ends - back] == ids[n - 1 - back]]
    if not len(ends):
        return NOTHING
    matched = least
    while matched < longest:
        further = ends[ends >= matched]
        further = further[ids[further - matched] == ids[n - 1 - matched]]
        if not len(further):
            break
        ends, matched = further, matched + 1
    after = ids[ends[-1] + 1 :][:most]
    return Proposal(matched, tuple(np.resize(after, most).tolist()))


class Prices:
    """What steps of each size took lately: seconds by rows, the median of the last few."""

    def __init__(self) -> None:
        self._lately: dict[int, deque[float]] = {}
        self._known: dict[int, float] = {}

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        lately = self._lately.setdefault(rows, deque(maxlen=5))
        lately.append(seconds)
        if len(lately) > 1:  # the first may have compiled
            self._known[rows] = sorted(lately)[(len(lately) - 1) // 2]

    def of(self, rows: int) -> float:
        """What a step of so many rows takes; as long as that is not known, a little more than one of fewer rows.

        Where none of those is known either, a little less than one of more.
        """
        if rows in self._known:
            return self._known[rows]
        near = max((size for size in self._known if size < rows), default=min(self._known, default=1))
        return self._known.get(near, 1.0) * _MORE ** (rows.bit_length() - near.bit_length())


def padded(rows: int) -> int:
    """Rows of the step that has room for so many: a power of two."""
    return 1 << (rows - 1).bit_length()


def shares(chances: Sequence[tuple[float, int]], limit: int, price: Callable[[int], float]) -> list[int]:
    """How many tokens to guess of each row of a decode step, so that it gives most tokens a second.

    ``chances``: of each row, how likely the next token of its guess is right if those before it were, and how many
    tokens there are. ``limit``: rows of the largest step; ``price``: seconds of a step of so many rows, padded.
    """
    rows = len(chances)
    best, rate = 0, _MARGIN * rows / price(padded(rows))
    line = [(-chance, i, 1) for i, (chance, most) in enumerate(chances) if most]
    heapify(line)
    order: list[int] = []
    gain = 0.0
    while line and rows + len(order) < limit:
        worth, i, count = line[0]
        chance, most = chances[i]
        heapreplace(line, (worth * chance if count < most else 0.0, i, count + 1))
        if not worth:
            break
        order.append(i)
        gain -= worth
        now = (rows + gain) / price(padded(rows + len(order)))
        if now > rate:
            best, rate = len(order), now
    counts = [0] * rows
    for i in order[:best]:
        counts[i] += 1
    return counts


@dataclass(slots=True)
class _Record:
    """How often a guessed token was right, of those whose predecessors were."""

    right: float
    tried: float

    def note(self, tried: float, right: float) -> None:
        self.right += right
        self.tried += tried
        if self.tried > _MANY:
            self.right, self.tried = self.right / 2, self.tried / 2

    @property
    def chance(self) -> float:
        return self.right / self.tried


def _owner(request: Request) -> bytes:
    """Whose text it may be guessed from: its tenant's own, in its namespace.

    Tenants may share what is cached, of which one must know all that stands before. Here four tokens would do to ask
    for the next one, since a request is told how many of its guesses were right.
    """
    return owner_of(request.namespace, request.tenant)


class NgramGuesser:
    """Guesses what followed in a request's own text (prompt lookup; Saxena 2023), or in what went through the cache.

    Args:
        suffixes: finds the latter; None: nobody asks for others' text.
        most: tokens in a guess.
        least, longest: how many of a request's last tokens must stand somewhere else, and how many are compared.
        rows: rows of the largest step.
    """

    def __init__(self, suffixes: Suffixes | None, *, most: int, least: int, longest: int, rows: int) -> None:
        self._suffixes = suffixes
        self._prices = Prices()
        self._most = most
        self._least, self._longest = least, longest
        self._rows = rows
        beliefs = (_FAIRLY + (_SURELY - _FAIRLY) * i / 5 for i in range(6))
        self._records = [_Record(_BELIEF * belief, _BELIEF) for belief in beliefs]

    def of(self, requests: Sequence[Request]) -> Sequence[tuple[int, ...]]:
        """See ``Guesses``."""
        nothing: list[tuple[int, ...]] = [()] * len(requests)
        if not self.possible(len(requests)):
            return nothing
        found = [self._find(request) for request in requests]
        if not any(each.tokens for each in found):
            return nothing
        chances = [(self._chance(r, each.matched), len(each.tokens)) for r, each in zip(requests, found, strict=True)]
        counts = shares(chances, self._rows, self._prices.of)
        for request, each, count in zip(requests, found, counts, strict=True):
            if each.tokens and not count:
                self._fade(request, each.matched, _FADE ** (1 / len(requests)))
            request.guessed.matched = each.matched
        return [each.tokens[:count] for each, count in zip(found, counts, strict=True)]

    def verified(self, request: Request, guessed: int, right: int) -> None:
        """See ``Guesses``."""
        own = request.guessed
        own.steps += 1
        if not guessed:
            return
        own.drafted += guessed
        own.accepted += right
        tried = min(guessed, right + 1)
        self._records[self._class(own.matched)].note(tried, right)
        own.right, own.tried = own.right * _REMEMBERED + right, own.tried * _REMEMBERED + tried

    def took(self, tokens: int, seconds: float) -> None:
        """See ``Guesses``."""
        self._prices.took(padded(tokens), seconds)

    def possible(self, rows: int) -> bool:
        """See ``Guesses``: whether steps of some size would give more tokens a second if all guesses were right."""
        size, limit = padded(rows), min(self._rows, rows * (1 + self._most))
        if limit <= rows:
            return False
        rate = rows / self._prices.of(size)
        while size < padded(limit):
            if min(size, limit) / self._prices.of(size) > rate:
                return True
            size *= 2
        return limit / self._prices.of(size) > rate

    def ended(self, request: Request) -> None:
        """See ``Guesses``. What of its prompt was cached is known, up to what stands before the rest."""
        if self._suffixes is not None and request.cached is not None:
            start = max(0, request.cached - self._longest)
            self._suffixes.add(_owner(request), request.ids[start : request.length])

    def forget(self) -> None:
        """See ``Guesses``."""
        if self._suffixes is not None:
            self._suffixes.clear()

    def _find(self, request: Request) -> Proposal:
        most = min(self._most, len(request.ids) - request.length - 1)
        if not request.guessable or most < 1:
            return NOTHING
        known = request.ids[max(0, request.length - LOOK_BACK) : request.length]
        own = repetition(known, self._least, self._longest, most)
        if self._suffixes is None or own.matched >= self._longest:
            return own
        others = self._suffixes.find(_owner(request), known[-self._longest :], most)
        return Proposal(*others) if others[0] >= max(self._least, own.matched + 1) else own

    def _class(self, matched: int) -> int:
        """By the length of what matched, in doublings."""
        return min(len(self._records) - 1, (matched // self._least).bit_length() - 1)

    def _chance(self, request: Request, matched: int) -> float:
        if not matched:
            return 0.0
        own = request.guessed
        return (own.right + self._records[self._class(matched)].chance * _BELIEF / 2) / (own.tried + _BELIEF / 2)

    def _fade(self, request: Request, matched: int, rate: float) -> None:
        """What was found is not tried: what is known of such guesses counts less, so that one day it is."""
        own, record = request.guessed, self._records[self._class(matched)]
        own.right, own.tried = own.right * rate, own.tried * rate
        belief = _FAIRLY * _BELIEF
        record.right = belief + (record.right - belief) * rate
        record.tried = _BELIEF + (record.tried - _BELIEF) * rate
