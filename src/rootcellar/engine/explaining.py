"""Why requests computed what they did: noted as they begin, judged when somebody asks, kept for an hour.

Noting is a copy of the prompt and some numbers, and at the end what was computed of the answer, on the engine's thread.
Judging compares prompts; it happens on the thread of whoever asks, or, when many wait to be judged, on one of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace

from rootcellar.cache import Key, Tier
from rootcellar.engine.output import Tracker
from rootcellar.misses import Earlier, Facts, Habit, Miss, Past, PrefillCost, costliest, judge

HOUR = 3600.0
RECENT = 1024
"""Requests that are found by their names."""
_KEPT = 16_384  # of up to 1.7 KB
_MANY = 64
_OPENERS = 4096


@dataclass(frozen=True, slots=True)
class _Noted:
    """What is to be judged of a request (None: it was), and the tokens that were computed of it by ``tick``."""

    rid: str
    tenant: str
    facts: Facts | None
    names: tuple[str, ...]
    key: Key
    flushes: int
    tick: int


class Explainer:
    """What is known of the newest requests of one engine."""

    def __init__(self, page_size: int) -> None:
        """Of a cache with such pages."""
        self._page_size = page_size
        self._flushes = 0
        self._openers: dict[int, tuple[str, str]] = {}
        self._noted: deque[_Noted] = deque(maxlen=2 * RECENT)
        self._lock = threading.Lock()  # of what follows
        self._past = Past()
        self._misses: deque[Miss] = deque(maxlen=_KEPT)
        self._named: deque[tuple[tuple[str, ...], Miss]] = deque(maxlen=RECENT)
        self._judging = False

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def forgotten(self) -> None:
        """All that was cached is gone."""
        self._flushes += 1

    def begun(
        self,
        tracker: Tracker,
        now: float,
        cost: PrefillCost,
        evicted_at: float | None,
        tick: int,
        known: int | None = None,
    ) -> None:
        """A request's prompt is computed at ``tick`` of the cache, or as many of its tokens as are ``known``.

        ``cost``, ``evicted_at``: see ``Facts``.
        """
        request = tracker.request
        if request.cached is None:
            return  # it never ran
        self._openers[request.opened] = request.rid, request.tenant
        if len(self._openers) > _OPENERS:
            del self._openers[next(iter(self._openers))]
        met = request.met
        gone = met.evicted
        rid, tenant = self._openers.get(gone.tick, ("", "")) if gone is not None else ("", "")
        key = request.key(request.prompt_length)
        facts = Facts(
            rid=request.rid,
            tenant=request.tenant,
            at=now,
            key=Key(key.tokens.copy(), key.namespace),
            cached=request.cached,
            wanted=met.wanted,
            page_size=self._page_size,
            reaches=met.reaches,
            branch=met.branch,
            evicted=gone,
            evicted_at=evicted_at,
            evicted_for=f"request {rid}" if rid and tenant == request.tenant else "another's request" if rid else "",
            slower=max((met.reaches[Tier.HOST] for each in request.decisions if not each.load), default=0),
            lost=request.lost,
            flushes=self._flushes,
            cost=cost,
            spent=tuple(tracker.spent),
            opened=request.opened,
        )
        self._note(facts, tracker, facts.key if known is None else facts.key[:known], tick)

    def ended(self, tracker: Tracker, key: Key, tick: int) -> None:
        """Of a request that had begun these tokens were computed by ``tick``: its prompt, and of its answer."""
        self._note(None, tracker, key, tick)

    def _note(self, facts: Facts | None, tracker: Tracker, key: Key, tick: int) -> None:
        request = tracker.request
        self._noted.append(_Noted(request.rid, request.tenant, facts, tracker.names, key, self._flushes, tick))
        if len(self._noted) > _MANY and not self._judging:
            self._judging = True
            threading.Thread(target=self._judge, name="rootcellar-explaining", daemon=True).start()

    # -- on any thread --------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Judge all that was noted."""
        with self._lock:
            try:
                while self._noted:
                    noted = self._noted.popleft()
                    if noted.facts is not None:
                        self._keep(judge(noted.facts, self._past), noted.names)
                    key = noted.key
                    if len(key):
                        earlier = Earlier(noted.rid, key.tokens, key.namespace, noted.flushes, noted.tick)
                        self._past.add(noted.tenant, earlier)
            finally:
                self._judging = False

    def _keep(self, miss: Miss, names: tuple[str, ...]) -> None:
        self._named.append((names, miss))
        # What cost nothing is no example of a habit: it is counted.
        self._misses.append(miss if miss.tokens else replace(miss, head=(), before=(), got=(), instead=()))
        while self._misses[0].at < miss.at - HOUR:
            self._misses.popleft()

    def find(self, name: str, tenant: str | None) -> Miss | None:
        """The newest request of this name, of a tenant or (None) of all; None: it is not known (any more)."""
        self._judge()
        with self._lock:
            for names, miss in reversed(self._named):
                if (name == miss.rid or name in names) and tenant in (None, miss.tenant):
                    return miss
        return None

    def report(self, tenant: str | None, now: float, most: int) -> tuple[float, int, int, list[Habit]]:
        """Of the hour before ``now``, or as much of it as is remembered: seconds, requests, tokens computed again, and
        the costliest habits.
        """
        self._judge()
        with self._lock:
            own = [miss for miss in self._misses if miss.at >= now - HOUR and tenant in (None, miss.tenant)]
            seconds = min(HOUR, now - self._misses[0].at) if len(self._misses) == _KEPT else HOUR
        return seconds, len(own), sum(miss.tokens for miss in own), costliest(own, most)
