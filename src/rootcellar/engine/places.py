"""The queue's places: who may still wait.

The queue has a limit for each tenant, of which one call takes three quarters at most. A call that is refused has been
read by then, its prompts and all; so what is known of a full queue can be asked by any thread before it reads one.
"""

from __future__ import annotations

from rootcellar.errors import QueueFull, RequestTooLarge
from rootcellar.scheduler import Scheduler


class Places:
    """For the engine's thread, but for :meth:`require_known`."""

    def __init__(self, scheduler: Scheduler, running: int, queued: int | None) -> None:
        """``running`` requests run, and ``queued`` (None: any number) of each tenant wait."""
        self._scheduler = scheduler
        self._running = running
        self._queued = queued
        self._full: dict[str, int] = {}
        """What is left for tenants that were refused lately. Replaced, never changed: other threads look at it."""

    def require(self, tenant: str, new: int) -> None:
        """Raise when so many more of a tenant's may not wait."""
        if self._queued is None:
            return
        if new > self._queued + self._running:
            raise RequestTooLarge(
                f"{new} sequences in one request; no more than {self._queued + self._running} can ever run and wait: "
                "send fewer, or raise max_queued_requests"
            )
        left = self._left(tenant, self._queued)
        if new > left:
            self._full = {**self._full, tenant: left}
            raise self._refusal(new, left)

    def require_known(self, tenant: str, new: int) -> None:
        """:meth:`require` for any thread: ``QueueFull`` where a tenant that was refused lately has no room yet."""
        left = self._full.get(tenant)
        most = (self._queued or 0) + self._running  # beyond it no time will do, which is another error
        if left is not None and left < new <= most:
            raise self._refusal(new, left)

    def look(self) -> None:
        """Something may have ended or begun: see what there is for those who were refused."""
        if self._full and self._queued is not None:
            left = {tenant: self._left(tenant, self._queued) for tenant in self._full}
            # Whoever has half of it again asks for itself.
            self._full = {tenant: places for tenant, places in left.items() if places < self._queued // 2}

    def _left(self, tenant: str, queued: int) -> int:
        free = max(0, self._running - len(self._scheduler.running))
        return queued + free - self._scheduler.waiting.places(tenant, queued - queued // 4 + free)

    def _refusal(self, new: int, left: int) -> QueueFull:
        return QueueFull(
            f"too many requests: {new} more, and there is room for {max(0, left)} (max_queued_requests is "
            f"{self._queued}); try again later or raise it"
        )
