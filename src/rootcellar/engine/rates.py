"""How fast bytes come from farther tiers, and prompts are computed: what loading and computing are weighed with; and
how much the cache's room is in demand, with which keeping is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import exp, inf

from rootcellar.scheduler import Rates, TierRate

_STEPS = 15
_LEAST = 16
"""Tokens of a step below which its time says little about computing many."""
_LIGHT = 8
"""A step with less than this part of the largest one's tokens is left out: most of its time is what any step costs."""
_SAMPLES = 8
# Parts of the cache: what so much more room would have kept left it less long ago than that part takes to fill.
_EDGES = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1
# Seconds, more than any hint asks for: nobody misses the room.
_ANY = 1e9
# Demand is of about so many cache sizes of computed tokens.
_MEMORY = 8


class Prefills:
    """How fast the last steps of prefill were: the median of their tokens, since the first of a shape compiles.

    Each token counts, not each step: hits leave only the end of a prompt to compute, and such steps are slow for what
    they compute. Nobody waits for a step that gives no token, so its time is that of the next one that does.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_STEPS)
        """Tokens and seconds."""
        self._tokens = 0
        self._seconds = 0.0

    def step(self, tokens: int, seconds: float, *, ended: bool) -> None:
        """A step took so long; it computed so many tokens of prompts. ``ended``: it gave somebody a token."""
        if tokens or self._tokens:
            self._tokens += tokens
            self._seconds += seconds
            if ended:
                most = max((kept for kept, _ in self._steps), default=0)
                if self._tokens >= max(_LEAST, most // _LIGHT) and self._seconds > 0:
                    self._steps.append((self._tokens, self._seconds))
                self._tokens, self._seconds = 0, 0.0

    @property
    def speed(self) -> float:
        """Tokens a second; 0 before the first."""
        left = sum(tokens for tokens, _ in self._steps) / 2
        for speed, tokens in sorted((tokens / seconds, tokens) for tokens, seconds in self._steps):
            left -= tokens
            if left <= 0:
                return speed
        return 0.0


class Demand:
    """How much the cache's room is in demand: what is computed though some more room would have kept it.

    Room for ``e`` tokens more keeps everything for as much longer as ``e`` tokens take to be computed. What is asked
    for again so soon after it left is what that room is worth: hits a second, for each token of room. Tokens that are
    kept for ``T`` seconds till somebody surely asks for them are worth ``1 / T`` (as Gittins' index, 1979, of a sure
    return; the marginal worth of room is that of Denning's working set, 1968). The ``e`` that is
    worth most counts: prompts that take turns need room for all of them.
    """

    def __init__(self, total_tokens: int) -> None:
        """Of a cache that holds so many."""
        self._edges = [total_tokens * edge for edge in _EDGES]
        self._memory = total_tokens * _MEMORY
        self._full = total_tokens
        self._computed = self._seconds = 0.0
        self._missed = [0.0] * len(_EDGES)
        """Tokens that were computed though so much more room would have kept them."""
        self._at: float | None = None

    def note(self, computed: int, age: float | None, now: float) -> None:
        """So many tokens of a prompt were computed at ``now``; ``age``: seconds since what the cache lacked of it had
        been evicted, None where it was not, or that is not remembered.
        """
        fade = exp(-computed / self._memory)
        self._seconds = self._seconds * fade + (0.0 if self._at is None else max(0.0, now - self._at))
        self._computed = self._computed * fade + computed
        self._at = now
        volume = inf if age is None else age * self._computed / self._seconds if self._seconds else 0.0
        for i, edge in enumerate(self._edges):
            self._missed[i] = self._missed[i] * fade + (computed if volume < edge else 0)

    @property
    def longest(self) -> float:
        """Seconds for which it pays to keep what is surely asked for then; infinite before the cache was full."""
        if self._computed < self._full:
            return inf
        worth = max(missed / edge for missed, edge in zip(self._missed, self._edges, strict=True))
        return self._seconds / worth if worth * self._full >= 1 else _ANY


class _Lane:
    """What a lane of the mover did lately."""

    def __init__(self) -> None:
        self._before = 0.0, 0.0
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        self._at = 0.0

    def forget(self) -> None:
        """What comes from now on comes from somewhere else."""
        self._samples.clear()
        self._at = 0.0

    def read(self, stats: Mapping[str, float], now: float) -> TierRate:
        """Take its totals."""
        total = stats["bytes"], stats["seconds"]
        if total[0] > self._before[0]:
            self._samples.append((total[0] - self._before[0], total[1] - self._before[1]))
            self._before, self._at = total, now
        nbytes, seconds = map(sum, zip(*self._samples, strict=True)) if self._samples else (0.0, 0.0)
        return TierRate(nbytes / seconds if seconds > 0 else 0.0, int(stats["queued_bytes"]), self._at)


class Meter:
    """Makes rates of what a mover and the steps of prefill did."""

    def __init__(self) -> None:
        self.prefills = Prefills()
        self._host, self._storage = _Lane(), _Lane()

    def other_store(self) -> None:
        """A store is attached: what another one did says nothing of it."""
        self._storage.forget()

    def rates(self, stats: Mapping[str, Mapping[str, float]], now: float) -> Rates:
        """``stats``: those of the mover; ``now``: by the engine's clock, in seconds."""
        return Rates(
            self.prefills.speed,
            self._host.read(stats["host-device"], now),
            self._storage.read(stats["storage-host"], now),
        )
