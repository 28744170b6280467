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
as tokens a second grow by it. A batch is padded to a power of two: what pads it may as well be guessed.

To learn how likely a guess is nothing need be tried: what is found is compared with what the request says then, whether
it was verified or not. And who guesses must know the newest token, so the step cannot be planned while the one before
runs, as it can be otherwise (``ahead.py``): what that costs is measured too. So the next step waits only where what was
found for a text that lacks its newest token promises more than the wait takes away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import RadixCache, Suffixes, owner_of
from rootcellar.scheduler.placeholders import ABOVE
from rootcellar.scheduler.request import NOTHING, Guessed, Proposal, Request
from rootcellar.scheduler.snapshots import Snapshots

LOOK_BACK = 1 << 14
"""Of its own text, the newest tokens in which a request looks for its end."""
_FAIRLY = 0.5
"""How likely the next token of a guess is right, as long as nothing is known: for the shortest match."""
_SURELY = 0.9
"""The same for the longest."""
_BELIEF = 8.0
"""Guessed tokens that such a belief counts for; a quarter as many, that a request is as likely right as others."""
_MANY = 256.0
_MORE = 1.25
"""Times as long as half as many rows, rows are taken to take until that is known: a likely guess finds out."""
_LONG = 512
"""Steps after which a price that was not paid again is forgotten."""
_MARGIN = 1.05
"""Times as many tokens a second as without it, a guess must promise: prices and chances are not known better."""
_REMEMBERED = 0.85
_MOST = 0.99
"""No guess is likelier than that."""


class Guesses(Protocol):
    """Says what decoding requests may say next."""

    def of(self, requests: Sequence[Request]) -> Sequence[tuple[int, ...]]:
        """For each request the tokens to verify after its newest; none is as good an answer as any."""

    def worth_waiting(self, requests: Sequence[Request]) -> bool:
        """Whether the next step should be planned when the newest tokens of these requests are known: for guesses."""

    def ended(self, request: Request) -> None:
        """A request that ran ended: this is all that it said."""

    def forget(self) -> None:
        """What is cached is flushed."""

    def took(self, tokens: int, seconds: float, *, ahead: bool = False) -> None:
        """A decode step of so many tokens, guessed ones among them, took so long.

        ``ahead``: it was planned while the one before ran.
        """

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
    """What steps of each size took lately: seconds by rows, the median of the last few; those planned ahead apart.

    What was not seen for long is forgotten: contexts were longer then, or the machine did something else.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._lately: dict[tuple[bool, int], deque[float]] = {}
        self._seen: dict[tuple[bool, int], int] = {}
        self._known: dict[bool, dict[int, float]] = {False: {}, True: {}}

    def took(self, rows: int, seconds: float, *, ahead: bool = False) -> None:
        """A step of so many rows took so long."""
        self._steps += 1
        self._seen[ahead, rows] = self._steps
        lately = self._lately.setdefault((ahead, rows), deque(maxlen=5))
        lately.append(seconds)
        if len(lately) > 1:  # the first may have compiled
            self._known[ahead][rows] = sorted(lately)[(len(lately) - 1) // 2]
        for how, size in [each for each, step in self._seen.items() if self._steps - step >= _LONG]:
            del self._seen[how, size], self._lately[how, size]
            self._known[how].pop(size, None)

    def of(self, rows: int, *, ahead: bool = False) -> float:
        """What a step of so many rows takes; as long as that is not known, what it takes planned the other way.

        Where that is not known either, a little more than one of fewer rows, or else a little less than one of more.
        """
        known = self._known[not ahead] | self._known[ahead]
        if rows in known:
            return known[rows]
        near = max((size for size in known if size < rows), default=min(known, default=1))
        return known.get(near, 1.0) * _MORE ** (rows.bit_length() - near.bit_length())


def padded(rows: int) -> int:
    """Rows of the step that has room for so many: a power of two."""
    return 1 << (rows - 1).bit_length()


def shares(
    chances: Sequence[Sequence[float]], limit: int, price: Callable[[int], float], alone: float | None = None
) -> list[int]:
    """How many tokens to guess of each row of a decode step, so that it gives most tokens a second.

    ``chances``: of each row, how likely each token of its guess is right if those before it are. ``limit``: rows of the
    largest step; ``price``: seconds of a step of so many rows, padded; ``alone``: of one without guesses, if that is
    another.
    """
    rows = len(chances)
    best, rate = 0, _MARGIN * rows / (price(padded(rows)) if alone is None else alone)
    line = [(-each[0], i, 1) for i, each in enumerate(chances) if each]
    heapify(line)
    order: list[int] = []
    gain = 0.0
    while line and rows + len(order) < limit:
        worth, i, count = line[0]
        if not worth:
            break
        heapreplace(line, (worth * chances[i][count] if count < len(chances[i]) else 0.0, i, count + 1))
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

    def note(self, right: bool) -> None:
        self.right += right
        self.tried += 1
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
        chances = self._chances(requests)
        if not any(chances):
            return [()] * len(requests)
        counts = shares(chances, self._rows, self._prices.of)
        return [r.guessed.found.tokens[:count] if count else () for r, count in zip(requests, counts, strict=True)]

    def worth_waiting(self, requests: Sequence[Request]) -> bool:
        """See ``Guesses``. The first token of what is found now must be right, for that after it to be guessed then."""
        chances = [each[1:] and [each[0] * each[1], *each[2:]] for each in self._chances(requests)]
        if not any(chances):
            return False
        alone = self._prices.of(padded(len(requests)), ahead=True)
        return any(shares(chances, self._rows, self._prices.of, alone))

    def verified(self, request: Request, guessed: int, right: int) -> None:
        """See ``Guesses``."""
        own = request.guessed
        own.steps += 1
        own.drafted += guessed
        own.accepted += right

    def took(self, tokens: int, seconds: float, *, ahead: bool = False) -> None:
        """See ``Guesses``."""
        self._prices.took(padded(tokens), seconds, ahead=ahead)

    def _possible(self, rows: int) -> bool:
        """Whether steps of some size would give so many rows more tokens a second if all guesses were right."""
        size, limit = padded(rows), min(self._rows, rows * (1 + self._most))
        if limit <= rows:
            return False
        rate = rows / self._prices.of(size, ahead=True)
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

    def _chances(self, requests: Sequence[Request]) -> list[list[float]]:
        """What may be guessed of each, left with it: how likely each token is right if those before it are."""
        if not self._possible(len(requests)):
            return [[]] * len(requests)
        for request in requests:
            own = request.guessed
            if own.at != request.length:
                self._compare(request)
                own.found, own.at = self._find(request), request.length
        return [self._chance(request.guessed) for request in requests]

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

    def _compare(self, request: Request) -> None:
        """What was found for a request with what it said then, whether that was verified or not."""
        own = request.guessed
        if not own.found.tokens:
            return
        own.right, own.expected = own.right * _REMEMBERED, own.expected * _REMEMBERED
        said = request.ids[own.at : min(request.length, own.at + len(own.found.tokens))].tolist()
        for i, (token, guess) in enumerate(zip(said, own.found.tokens, strict=False)):
            record = self._record(own.found.matched + i)
            own.expected += record.chance
            own.right += token == guess
            record.note(token == guess)
            if token != guess:
                break

    def _record(self, matched: int) -> _Record:
        """By the length of what matched, in doublings."""
        return self._records[min(len(self._records), (matched // self._least).bit_length()) - 1]

    def _chance(self, own: Guessed) -> list[float]:
        """How likely others' guesses are right where so much matched, times how much likelier its own were of late."""
        likelier = (own.right + _BELIEF / 4) / (own.expected + _BELIEF / 4)
        matched = own.found.matched
        return [min(_MOST, self._record(matched + i).chance * likelier) for i in range(len(own.found.tokens))]
