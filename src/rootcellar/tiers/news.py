"""What became of copies and questions: told by the threads that do the work, taken by the one that runs the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from rootcellar.cache import Answer, Event, Reports
from rootcellar.pools.copying import Fetched
from rootcellar.tiers.lane import Shipment


class News:
    """What nobody was told of yet, and how much there is still to tell.

    Attributes:
        changed: notified whenever this, or a lane, changes; its lock guards both.
        under_way: copies and questions that were begun and not told; changed under the lock.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.under_way = 0
        self._events: list[Event] = []
        self._answers: list[Answer] = []
        self._fetched: list[tuple[Shipment, Fetched]] = []
        self._wake: Callable[[], None] = _nobody

    def listen(self, wake: Callable[[], None] | None) -> None:
        """Call ``wake``, on any thread, when there is something to take that nobody was told of; None: no more."""
        self._wake = wake or _nobody

    def tell(
        self,
        events: Sequence[Event] = (),
        answers: Sequence[Answer] = (),
        fetched: Sequence[tuple[Shipment, Fetched]] = (),
        *,
        ended: int = 0,
    ) -> None:
        """There is news, of so many that are no longer under way; whoever takes it is woken unless that was done.

        ``fetched``: images that have to be written to the device.
        """
        with self.changed:
            first = not self._waiting
            self._events += events
            self._answers += answers
            self._fetched += fetched
            self.under_way -= ended
            self.changed.notify_all()
        if first and (events or answers or fetched):
            self._wake()

    def take(self) -> tuple[Reports, list[tuple[Shipment, Fetched]]]:
        """All of it, at once: whatever is told from here on wakes again."""
        with self.changed:
            reports = Reports(tuple(self._events), tuple(self._answers))
            fetched, self._fetched = self._fetched, []
            self._events, self._answers = [], []
        return reports, fetched

    def wait(self, seconds: float | None) -> bool:
        """Wait until there is something to take, or nothing is under way, or so many seconds are over (None: never).

        Returns whether there is something to take.
        """
        with self.changed:
            self.changed.wait_for(lambda: not self.under_way or self._waiting, seconds)
            return self._waiting

    @property
    def _waiting(self) -> bool:
        return bool(self._events or self._answers or self._fetched)


def _nobody() -> None:
    """Nobody listens."""
