"""What waiting requests will find cached leaves the cache last: the cache is told who waits, the next first.

The whole line is said each time, in place of what was said before, so nothing of a request that started, ended or went
to another place can stay behind. A long line is said again only when an eighth of it has changed, so a change costs
at most eight walks of a prompt, however many wait; who started meanwhile holds what it needs anyway, and who came
meanwhile is far back in line. Only the next ``MOST`` are said: the others' turns come after as many prompts.
"""

from __future__ import annotations

from collections.abc import Callable

from rootcellar.cache import RadixCache
from rootcellar.scheduler.shares import Lines

MOST = 512
_PART = 8


class Foresight:
    """Tells a cache what is asked of it next; one for each scheduler."""

    def __init__(self, cache: RadixCache) -> None:
        self._cache = cache
        self._told = 0
        self._changes = 0

    def changed(self, waiting: int) -> None:
        """Somebody came or went, or something may be cached that somebody waits for; so many wait now."""
        self._changes += 1
        if not waiting:
            if self._told:
                self._cache.foresee([])
            self._told = self._changes = 0

    def tell(self, lines: Callable[[], Lines]) -> None:
        """Say who waits, if that has changed by enough; ``lines`` makes them, none of whom has got a row since."""
        if self._changes and self._changes * _PART >= self._told:
            requests = lines().upcoming(MOST)
            self._cache.foresee([request.key(request.matchable) for request in requests])
            self._told, self._changes = len(requests), 0
