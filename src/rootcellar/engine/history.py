"""The last minutes of an engine, in samples: how full each tier is, and totals whose differences are rates.

A sample is taken at the end of a step, once a second and when the work ends; an idle engine takes none, since nothing
changes. Who looks later, a page that is opened now, sees what was.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from rootcellar.cache import CacheStats, Kind, RadixCache, ShelfStats, Tier
from rootcellar.engine.metrics import Counts, Metrics
from rootcellar.runner import Runner
from rootcellar.scheduler import Scheduler

INTERVAL = 1.0
SAMPLES = 600
# Of all tenants together: with many of them each has fewer.
TENANTS_SAMPLES = 16_384


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: seconds of the engine's clock, occupancy by tier, and totals since the engine began.

    ``first_tokens``, ``first_token_seconds``: how many requests came to their first token, and how long they waited for
    it in all.
    """

    at: float
    occupancy: dict[str, dict[str, float]]
    input_tokens: int
    hit_tokens: int
    generated_tokens: int
    first_tokens: int
    first_token_seconds: float

    def words(self, began: float) -> dict[str, Any]:
        """As the feed sends it, its time in seconds after ``began``; fields as in ``numbers``."""
        return {
            "at": self.at - began,
            "stats": {
                "occupancy": self.occupancy,
                "input_tokens": self.input_tokens,
                "hit_tokens": self.hit_tokens,
                "generated_tokens": self.generated_tokens,
            },
            "latency": {"first_token": {"count": self.first_tokens, "sum": self.first_token_seconds}},
        }


class History:
    """The samples of all, and those of each tenant's own. Written and read on the engine's thread."""

    def __init__(self, scheduler: Scheduler, runner: Runner, metrics: Metrics, now: float) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._taken = now - INTERVAL
        self._all: deque[Sample] = deque()
        self._own: dict[str, deque[Sample]] = {}

    def of(self, tenant: str | None) -> list[Sample]:
        """A tenant's (None: those of all), the oldest first."""
        return list(self._all if tenant is None else self._own.get(tenant, ()))

    def step_ended(self, generated: int, now: float) -> None:
        """Take a sample if one is due; ``generated``: tokens since the engine began."""
        if now - self._taken < INTERVAL and not self._scheduler.idle:
            return
        self._taken = now
        cache = self._scheduler.cache
        stats = cache.stats()
        used = occupancy(cache, self._runner, stats)
        totals = stats.input_tokens, stats.hit_tokens, generated
        _keep(self._all, Sample(now, used, *totals, *self._metrics.all.first_tokens()), SAMPLES)
        tenants = self._metrics.tenants()
        for gone in self._own.keys() - tenants.keys():
            del self._own[gone]
        most = max(2, min(SAMPLES, TENANTS_SAMPLES // max(1, len(tenants))))
        for name, counts in tenants.items():
            sample = own_sample(now, counts)
            ring = self._own.setdefault(name, deque())
            if not ring or ring[-1].generated_tokens != sample.generated_tokens:
                _keep(ring, sample, most)


def own_sample(now: float, counts: Counts) -> Sample:
    """Of one tenant, who shares the memory: without how full it is."""
    totals = counts.prompt_tokens, counts.cached_tokens, counts.generated
    return Sample(now, {}, *totals, *counts.first_tokens())


def _keep(ring: deque[Sample], sample: Sample, most: int) -> None:
    """Add the newest sample. At most two are of one interval, so that many short requests do not push out the past."""
    if len(ring) > 1 and sample.at - ring[-2].at < INTERVAL:
        ring.pop()
    ring.append(sample)
    while len(ring) > most:
        ring.popleft()


def kinds_by_pool(cache: RadixCache, runner: Runner) -> dict[str, list[Kind]]:
    """The kinds whose pages lie in each pool of the device."""
    by_pool: dict[str, list[Kind]] = {}
    for kind in cache.kinds:
        by_pool.setdefault(runner.pool_of[kind.name], []).append(kind)
    return by_pool


def occupancy(cache: RadixCache, runner: Runner, stats: CacheStats) -> dict[str, dict[str, float]]:
    """By tier, the parts of the room that are used, and used by what cannot be evicted now.

    Pools count by their bytes, or those of as many pages of theirs as a tier has.
    """
    rooms: dict[Tier, list[tuple[float, list[ShelfStats]]]] = {}
    for name, kinds in kinds_by_pool(cache, runner).items():
        device = stats.shelves[kinds[0].name, Tier.DEVICE].size
        for tier in dict.fromkeys(tier for _, tier in stats.shelves):
            shelves = [stats.shelves[kind.name, tier] for kind in kinds]
            weight = runner.pools[name].nbytes * (shelves[0].size / device if device else 0.0)
            rooms.setdefault(tier, []).append((weight, shelves))
    return {
        tier.name: {
            "used": _share(room, [sum(s.used for s in shelves) for _, shelves in room]),
            "busy": _share(room, [sum(s.used - s.evictable for s in shelves) for _, shelves in room]),
        }
        for tier, room in rooms.items()
    }


def _share(room: list[tuple[float, list[ShelfStats]]], taken: list[int]) -> float:
    """The part of ``room`` (weights, and shelves of one size) that so many tokens of each take."""
    whole = sum(weight for weight, _ in room)
    parts = [weight * n / s[0].size for (weight, s), n in zip(room, taken, strict=True) if s[0].size]
    return sum(parts) / whole if whole else 0.0
