"""One line of the log per interval that says what the engine does."""

from __future__ import annotations

import logging

from rootcellar.cache import CacheStats, Tier
from rootcellar.scheduler import Scheduler

log = logging.getLogger(__name__)


class StatsLogger:
    """Logs after every interval of work, and when the work ends, at most once an interval; an idle engine is silent.

    Rates and the hit rate are those of the time since work began or the last line.
    """

    def __init__(self, interval: float, now: float) -> None:
        self._interval = interval
        self._idle = True
        self._line = now - interval
        self._busy_since = now
        self._before = (0, 0, 0, 0)

    def step_ended(self, scheduler: Scheduler, generated: int, prompted: int, began: float, ended: float) -> None:
        """A step ended; ``generated`` and ``prompted``: tokens so far. Logs the line if one is due."""
        if self._idle:
            self._busy_since = began
        self._idle = scheduler.idle
        since = max(self._line, self._busy_since)
        due = ended > since and ended - (self._line if self._idle else since) >= self._interval
        if not due and not self._idle:
            return
        stats = scheduler.cache.stats()
        totals = (generated, prompted, stats.input_tokens, stats.hit_tokens)
        made, computed, asked, hit = (new - old for new, old in zip(totals, self._before, strict=True))
        self._before = totals
        if due:
            self._line = ended
            log.info(
                "running %d, queued %d, generated %.1f tok/s, prefilled %.1f tok/s, cache used: %s, hit rate %s, "
                "retractions %d",
                len(scheduler.running),
                len(scheduler.waiting),
                made / (ended - since),
                computed / (ended - since),
                _use(stats),
                f"{hit / asked:.0%}" if asked else "-",
                scheduler.retractions,
            )


def _use(stats: CacheStats) -> str:
    return ", ".join(
        f"{kind} {tier.name} {shelf.used / shelf.size:.0%}"
        for (kind, tier), shelf in stats.shelves.items()
        if shelf.size and (tier is Tier.DEVICE or shelf.used)
    )
