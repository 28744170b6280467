"""What waiting requests will find cached leaves the cache last: the cache is told who waits, the next first.

The whole line is said each time, in place of what was said before, so nothing of a request that started, ended or went
to another place can stay behind. A long line is said again only when a quarter of it has changed, so a change costs at
most four walks of a prompt, however many wait. A start is none: who runs holds what it needs, with what it computes,
till it ends. Who came meanwhile is far back in line. Only the next ``MOST`` are said: the turns of the others come
after as many prompts.
"""

from __future__ import annotations

from collections.abc import Callable

from rootcellar.cache import RadixCache
from rootcellar.scheduler.shares import Lines

MOST = 512
_PART = 4


class Foresight:
    """Tells a cache what is asked of it next; one for each scheduler."""

    def __init__(self, cache: RadixCache) -> None:
        self._cache = cache
        self._told = 0
        self._changes = 0

    def changed(self) -> None:
        """Somebody came or ended, or something came from afar that may be waited for."""
        self._changes += 1

    def look(self, waiting: int) -> None:
        """So many wait now: where nobody does, the cache is told at once, as nothing may be planned for long."""
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
