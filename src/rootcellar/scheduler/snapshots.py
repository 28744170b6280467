"""When a request leaves a recurrent state in the cache, so that later ones can resume there.

Keys and values of a prefix serve every request that shares any part of it; a state serves only those that share all of
it, and is as large as thousands of tokens. So where it is taken matters:

    prompt   [ system prompt ........... | question ........ ]      answer
             |           |               |                 |           |
             interval    interval        branch            tail        interval

* every ``interval`` tokens, for what nobody knows yet will be shared;
* at the *branching point*: where a prompt leaves what the cache knows, others are likely to leave it too;
* at the *tail* of a prompt, its last page boundary before the newest token: the same prompt again, or its continuation;
* wherever else a step ends on a page boundary.

How long a state is kept is the cache's business: those that only serve places where nobody stopped leave first.
"""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.scheduler.request import Request


@dataclass(frozen=True)
class Snapshots:
    """Where states are left.

    Attributes:
        page_size: tokens in a page; a state can only be left at the end of one.
        interval: a state is left at multiples of this many tokens, rounded up to whole pages.
        least: no state is left within so many tokens of the one before it.
    """

    page_size: int
    interval: int
    least: int = 32

    @property
    def period(self) -> int:
        """``interval`` in whole pages, in tokens."""
        return -(-self.interval // self.page_size) * self.page_size

    def stop(self, request: Request, stop: int) -> int:
        """Where a chunk of ``request`` that would end at ``stop`` should end, so that a state can be left there."""
        first = max(request.computed + 1, request.resumable + self._apart(request))
        interval = -(-first // self.period) * self.period
        tail = (request.length - 1) // self.page_size * self.page_size
        wanted = (interval, request.branch, tail)
        return min((at for at in wanted if first <= at < stop), default=stop)

    def until(self, request: Request) -> int:
        """Tokens, one at least, that ``request`` has to decode up to where it may leave its next state."""
        return self.period - request.computed % self.period

    def possible(self, request: Request, at: int) -> bool:
        """Whether ``request`` leaves a state when it has computed ``at`` tokens and goes on, or ends there."""
        return at % self.page_size == 0 and at - request.resumable >= self._apart(request)

    def due(self, request: Request, decode: bool) -> bool:
        """Whether ``request`` should leave the state that it has now; after decoding only every ``interval``."""
        at = request.computed
        if at % (self.period if decode else self.page_size):
            return False
        return at - request.resumable >= self._apart(request)

    def _apart(self, request: Request) -> int:
        """Tokens between two states; another node resumes at the last one of a prompt that is computed for it."""
        return 1 if request.gives else self.least
