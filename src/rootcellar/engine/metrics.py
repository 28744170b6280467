"""What the engine's thread counts while it works: tokens, times, and how old KV is when it is evicted.

Written by the engine's thread only, a few additions a step; read there too (``Sight``), so nothing needs a lock. Times
are seconds of the engine's clock. The cache knows no clock: :class:`TickTimes` says when its ticks were.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rootcellar.cache import Eviction

# Upper bounds of the buckets, in seconds; the last bucket has none.
LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
TOKEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.8, 2, 5)
STEP = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4)
MOST_TENANTS = 1024
AGE = (0.1, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often a value fell into each bucket: ``counts[i]`` of at most ``bounds[i]``, the last above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Values in all."""
        return sum(self.counts)


Distributions = dict[str, list[tuple[dict[str, str], Distribution]]]
"""By name, each with its labels."""


class Histogram:
    """A distribution that grows."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Note a value, ``times`` times. O(log buckets)."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def view(self) -> Distribution:
        """What was observed so far."""
        return Distribution(self._bounds, tuple(self._counts), self._sum)


class TickTimes:
    """When the cache's last ``size`` ticks were; older ones count as the oldest that is known."""

    def __init__(self, now: float, size: int = 65536) -> None:
        self.tick = 0
        self._times = array("d", [now]) * size

    def note(self, tick: int, now: float) -> None:
        """The cache has come to ``tick``."""
        size = len(self._times)
        for t in range(max(self.tick + 1, tick - size + 1), tick + 1):
            self._times[t % size] = now
        self.tick = tick

    def at(self, tick: int) -> float:
        """When ``tick`` was."""
        oldest = max(0, self.tick - len(self._times) + 1)
        return self._times[max(tick, oldest) % len(self._times)]


class Counts:
    """Running totals and histograms of requests: of all, or of one tenant's.

    Attributes:
        prompt_tokens, cached_tokens: of requests that came to their first token.
        generated: tokens of answers.
        finished: requests that ended, by type of ``finish_reason``.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generated = 0
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        self._first_token, self._queue, self._request = Histogram(LATENCY), Histogram(LATENCY), Histogram(LATENCY)
        self._inter_token = Histogram(TOKEN)
        self._stages: dict[str, Histogram] = {}

    def first_token(self, seconds: float, queued: float, prompt_tokens: int, cached_tokens: int) -> None:
        """A request got its first token ``seconds`` after it came, having waited ``queued`` of them."""
        self._first_token.observe(seconds)
        self._queue.observe(queued)
        self.generated += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def next_token(self, seconds: float) -> None:
        """A request got a token so long after the one before."""
        self.generated += 1
        self._inter_token.observe(seconds)

    def first_tokens(self) -> tuple[int, float]:
        """How many requests came to their first token, and the seconds that they waited for it in all."""
        view = self._first_token.view()
        return view.count, view.sum

    def ended(self, finish: str, seconds: float, stages: Sequence[tuple[str, float]]) -> None:
        """A request ended; ``stages``: when each began, the last being its end."""
        self.finished[finish] += 1
        self._request.observe(seconds)
        for (name, begin), (_, end) in pairwise(stages):
            if name not in self._stages:
                self._stages[name] = Histogram(LATENCY)
            self._stages[name].observe(end - begin)

    def distributions(self) -> Distributions:
        """Every distribution by name, each with its labels; counted by event."""
        return {
            "time_to_first_token_seconds": [({}, self._first_token.view())],
            "inter_token_latency_seconds": [({}, self._inter_token.view())],
            "queue_time_seconds": [({}, self._queue.view())],
            "request_seconds": [({}, self._request.view())],
            "stage_seconds": [({"stage": name}, h.view()) for name, h in sorted(self._stages.items())],
        }


class Metrics:
    """Running totals and histograms of one engine.

    Attributes:
        all: of all requests.
        outside_seconds: by phase, the part of the steps' time in which the device had nothing to do: planning, building
            the batch, following the tokens.
        verified, drafted, accepted: where tokens are guessed: rows of decode steps, tokens guessed, and those that were
            right.
    """

    def __init__(self, now: float) -> None:
        self.ticks = TickTimes(now)
        self.all = Counts()
        self._tenants: dict[str, Counts] = {}
        self.outside_seconds = {"prefill": 0.0, "decode": 0.0}
        self._steps = {"prefill": Histogram(STEP), "decode": Histogram(STEP)}
        self.verified = self.drafted = self.accepted = 0
        self._ages: dict[tuple[str, str], Histogram] = {}
        self._idle: dict[tuple[str, str], Histogram] = {}

    def guesses(self, tokens: Sequence[Sequence[int]], guessed: Sequence[int]) -> None:
        """A decode step gave these tokens by row, where so many were guessed."""
        self.verified += len(tokens)
        self.drafted += sum(guessed)
        self.accepted += sum(map(len, tokens)) - len(tokens)

    def step(self, decode: bool, seconds: float, device_seconds: float) -> None:
        """A step took so long, the device so much of it."""
        phase = "decode" if decode else "prefill"
        self._steps[phase].observe(seconds)
        self.outside_seconds[phase] += seconds - device_seconds

    def of(self, tenant: str) -> Counts:
        """What is counted of one tenant's requests; made when it is first asked for."""
        if tenant not in self._tenants:
            # A server's tenants are few; whoever makes up one for each call must not fill the memory.
            if len(self._tenants) >= MOST_TENANTS:
                del self._tenants[next(iter(self._tenants))]
            self._tenants[tenant] = Counts()
        return self._tenants[tenant]

    def tenants(self) -> Mapping[str, Counts]:
        """What is counted of each tenant's requests."""
        return self._tenants

    def cache_moved_on(self, tick: int, evictions: Sequence[Eviction], now: float) -> None:
        """The cache came to ``tick`` and evicted these entries."""
        if tick != self.ticks.tick:
            self.ticks.note(tick, now)
        for gone in evictions:
            where = gone.kind, gone.tier.name
            if where not in self._ages:
                self._ages[where], self._idle[where] = Histogram(AGE), Histogram(AGE)
            self._ages[where].observe(now - self.ticks.at(gone.created), gone.tokens)
            self._idle[where].observe(now - self.ticks.at(gone.used), gone.tokens)

    def distributions(self) -> Distributions:
        """Every distribution by name, each with its labels. KV's ages are counted by token, the others by event."""
        by_shelf = [
            (name, [({"kind": kind, "tier": tier}, h.view()) for (kind, tier), h in ages.items()])
            for name, ages in (("kv_age_at_eviction_seconds", self._ages), ("kv_idle_at_eviction_seconds", self._idle))
        ]
        return {
            **self.all.distributions(),
            "step_seconds": [({"phase": phase}, h.view()) for phase, h in self._steps.items()],
            **dict(by_shelf),
        }
