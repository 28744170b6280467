"""The requests that have not ended: by themselves, and by the names that their callers gave them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rootcellar.engine.output import Tracker
from rootcellar.errors import RequestError
from rootcellar.scheduler import Request


class Roster:
    """Who is alive. Names are a tenant's own, and all who share one belong to one call.

    Attributes:
        trackers: by request.
    """

    def __init__(self) -> None:
        self.trackers: dict[Request, Tracker] = {}
        self._named: dict[tuple[str, str], list[Tracker]] = {}
        self._calls: dict[int, dict[Request, Tracker]] = {}

    def add(self, call: int, trackers: Sequence[Tracker]) -> None:
        """Take the requests of one call, all or none; ``RequestError``: one of their names is in use."""
        self._require_free(trackers)
        if trackers:
            self._calls[call] = {tracker.request: tracker for tracker in trackers}
        for tracker in trackers:
            self.trackers[tracker.request] = tracker
            for name in tracker.names:
                self._named.setdefault((tracker.request.tenant, name), []).append(tracker)

    def remove(self, request: Request) -> Tracker:
        """Forget a request that ended, and its names."""
        tracker = self.trackers.pop(request)
        call = self._calls[request.call]
        del call[request]
        if not call:
            del self._calls[request.call]
        for name in tracker.names:
            group = self._named[request.tenant, name]
            group.remove(tracker)
            if not group:
                del self._named[request.tenant, name]
        return tracker

    def named(self, name: str, tenant: str | None) -> list[Tracker]:
        """Those of a tenant (None: of all) that go by this name: an answer, those of a prompt, or of a whole call."""
        if tenant is not None:
            return list(self._named.get((tenant, name), ()))
        return [tracker for (_, each), group in self._named.items() if each == name for tracker in group]

    def of(self, tenant: str | None) -> list[Tracker]:
        """Those of a tenant (None: of all), the oldest first."""
        return [t for t in self.trackers.values() if tenant in (None, t.request.tenant)]

    def of_call(self, call: int) -> list[Tracker]:
        """Those of one call, in its order."""
        return list(self._calls.get(call, {}).values())

    def late(self, now: float) -> list[Tracker]:
        """Those whose deadline has passed. All have the same time, so the oldest are the first to be late."""
        return list(itertools.takewhile(lambda t: t.deadline is not None and now >= t.deadline, self.trackers.values()))

    @property
    def next_deadline(self) -> float | None:
        """When the first of them will be late; None: never."""
        first = next(iter(self.trackers.values()), None)
        return None if first is None else first.deadline

    def _require_free(self, trackers: Sequence[Tracker]) -> None:
        """A name stands for one answer, one prompt or one call, and for nothing else at the same time."""
        meant: dict[str, tuple[str, ...]] = {}
        for tracker in trackers:
            names = tracker.names
            for i, name in enumerate(names):
                way = names[: i + 1]
                answer = i == len(names) - 1
                taken = (tracker.request.tenant, name) in self._named or meant.get(name, way) != way
                if taken or (answer and name in meant):
                    raise RequestError(f"request id {name!r} is in use; give another rid, or none")
                meant[name] = way
