"""What callers say of a prompt's future, each answered: how long to keep it, when it comes next, that it may go.

A hint is granted, clipped (for less time, or of less of the prompt), deferred (it will be done later) or refused, and
the answer says why. For the engine's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, Literal

from rootcellar.cache import NEVER, Key, RadixCache, Tier
from rootcellar.engine.pins import SORTS, Pins, Sort
from rootcellar.errors import RequestError
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Prefetcher, Request, Scheduler

TIMED = ("pin", "retain", "next_turn")
PLAIN = ("demote", "prefetch")
LONGEST = {"pin": 86_400.0, "retain": 3_600.0, "next_turn": 3_600.0}
"""Seconds that each is taken for at most."""
# A turn may come later than it was expected: by this part of the time, and so many seconds.
_LATE = 0.5, 5.0
# What is retained for so many times as long as pays by now is given up; the first of them where nothing was known when
# it was granted.
_HOPELESS = 2, 8
# That is looked at when so much of the time until the first of them ends has passed, in so many seconds at the soonest.
_LOOK = 1 / 8, 0.05
# What a store has is brought nearer so many seconds before a turn.
_LEAD = 2.0
# Turns that are waited for, and tokens of their prompts; a tenant's share of both. Others wait for theirs in the store.
_TURNS, _TURN_TOKENS = 4096, 1 << 22


@dataclass(frozen=True, slots=True, order=True)
class _Turn:
    """When what a store has of a tenant's prompt is to be brought nearer."""

    at: float
    tenant: str = field(compare=False)
    key: Key = field(compare=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one hint. ``tokens``: of the prompt, that it is about; ``seconds``: for how long, or until when."""

    hint: str
    answer: Literal["granted", "clipped", "deferred", "refused"]
    why: str = ""
    tokens: int = 0
    seconds: float | None = None

    def fields(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def check_hints(given: object) -> dict[str, float]:
    """Hints as seconds by name (0 for those that have none); ``RequestError`` says what is wrong with others."""
    if not isinstance(given, Mapping) or not given:
        raise RequestError(f"hints must be an object with some of {', '.join((*TIMED, *PLAIN))}")
    checked: dict[str, float] = {}
    for name, value in given.items():
        if name in PLAIN and isinstance(value, bool):
            if value:
                checked[name] = 0.0
        elif name in TIMED and isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
            checked[name] = float(value)
        else:
            want = "true or false" if name in PLAIN else "a number of seconds"
            known = f"it must be {want}" if name in (*TIMED, *PLAIN) else f"known are {', '.join((*TIMED, *PLAIN))}"
            raise RequestError(f"hints: {str(name)[:40]}={str(value)[:40]!r} is not allowed: {known}")
    return checked


class Hints:
    """Takes hints, and does at their time what was put off."""

    def __init__(self, scheduler: Scheduler, pins: Pins, prefetcher: Prefetcher) -> None:
        """For requests of ``scheduler``."""
        self._scheduler = scheduler
        self._pins = pins
        self._prefetcher = prefetcher
        self._turns: list[_Turn] = []
        self._look: float | None = None

    def take(
        self, tenant: str, key: Key, hints: Mapping[str, float], share: float, now: float, longest: float = inf
    ) -> list[Reply]:
        """Answer checked ``hints`` on ``key``; ``share``: of what pins may hold, the tenant's.

        ``longest``: seconds for which it pays by now to keep what is surely asked for then (``Demand``).
        """
        replies = [self._answer(name, tenant, key, seconds, share, now, longest) for name, seconds in hints.items()]
        self._plan_look(now)
        return replies

    def _answer(
        self, name: str, tenant: str, key: Key, seconds: float, share: float, now: float, longest: float
    ) -> Reply:
        match name:
            case "pin":
                return self._keep(name, tenant, key, seconds, share, now)
            case "retain" | "next_turn" if seconds > longest:
                why = f"others want the room sooner: by now it pays to keep it for {longest:.3g} seconds at most"
                return self._deferred(Reply(name, "refused", why), tenant, key, seconds, share, now)
            case "retain":
                return self._keep(name, tenant, key, seconds, share, now, known=longest < inf)
            case "next_turn":
                late = max(_LATE[0] * seconds, _LATE[1]) if seconds else 0.0
                kept = self._keep(name, tenant, key, seconds + late, share, now, known=longest < inf)
                return self._deferred(kept, tenant, key, seconds, share, now)
            case "demote":
                return self._demote(tenant, key)
            case _:
                return self._prefetch(key, now)

    def _keep(
        self, name: str, tenant: str, key: Key, seconds: float, share: float, now: float, *, known: bool = True
    ) -> Reply:
        """Pin or retain; ``known``: whether the demand for room is."""
        sort: Sort = "pin" if name == "pin" else "retained"
        if not seconds:
            found = self._pins.remove(tenant, key, sort)
            return Reply(name, "granted" if found else "refused", "" if found else "there was none")
        time = min(seconds, LONGEST[name])
        whole = self._whole(key)
        once = name == "next_turn"
        tokens, _ = self._pins.add(tenant, key, now + time, share, sort=sort, clip=True, once=once, known=known)
        if not tokens and self._cache.match(key).length:
            return Reply(name, "refused", "what the caller may pin is used up")
        if not tokens:
            return Reply(name, "refused", "nothing of it is cached on the device")
        why = []
        if tokens < whole:
            cached = self._cache.match(key).length
            why.append("the rest is not cached" if tokens == cached else "what the caller may pin is used up")
        if time < seconds:
            why.append(f"at most {time:.0f} seconds are taken")
        return Reply(name, "clipped" if why else "granted", "; ".join(why), tokens, time)

    def _deferred(self, kept: Reply, tenant: str, key: Key, seconds: float, share: float, now: float) -> Reply:
        """The answer; before a turn what the store has of it is brought, which is what becomes of one not kept."""
        if kept.hint != "next_turn":
            return kept
        self._turns = [turn for turn in self._turns if (turn.tenant, turn.key) != (tenant, key)]
        heapify(self._turns)
        if 0 < seconds <= LONGEST["next_turn"] and self._may_wait(tenant, key, share):
            heappush(self._turns, _Turn(now + max(0.0, seconds - _LEAD), tenant, key))
            if kept.answer == "refused":
                why = f"{kept.why}; what the store has of it is brought before the turn"
                return Reply("next_turn", "deferred", why, 0, seconds)
        return kept

    def _may_wait(self, tenant: str, key: Key, share: float) -> bool:
        """Whether one more turn of the tenant's may be waited for."""
        if self._prefetcher.rules is None or len(self._turns) >= _TURNS:
            return False
        own = [len(turn.key) for turn in self._turns if turn.tenant == tenant]
        return len(own) < _TURNS * share and sum(own) + len(key) <= _TURN_TOKENS * share

    def _demote(self, tenant: str, key: Key) -> Reply:
        """Let go of what the tenant keeps of it, copy it to farther tiers, and let it leave the device before all else.

        What others go on from, or keep, stays where it is in the order of leaving.
        """
        cached = self._cache.match(key).length
        if not cached:
            return Reply("demote", "refused", "nothing of it is cached on the device")
        kept = [self._pins.remove(tenant, key, sort) for sort in SORTS]
        copies = self._cache.write_down(key)
        tokens = self._cache.expect(key, NEVER)
        why = ["it is copied to a farther tier"] if copies else []
        if tokens < cached:
            why.append("others go on from the rest" if tokens else "others go on from it")
        answer: Literal["granted", "clipped", "refused"] = "granted" if tokens == cached else "clipped"
        return Reply("demote", answer if tokens or copies or any(kept) else "refused", "; ".join(why), tokens)

    def _prefetch(self, key: Key, now: float) -> Reply:
        """Ask the store for what host memory lacks."""
        near = self._cache.match(key).reach(Tier.HOST)
        if near >= self._whole(key):
            return Reply("prefetch", "granted", "it is in memory", near)
        if self._prefetcher.rules is None:
            return Reply("prefetch", "refused", "there is no store", near)
        asked = self._bring(key, now)
        why = "the store is asked" if asked else "what the store may have is too little to be worth it"
        return Reply("prefetch", "deferred" if asked else "refused", why, near)

    def _bring(self, key: Key, now: float) -> bool:
        """Let come to the host what the store has of ``key``, as for a request that is never run."""
        epoch, _, namespace = key.namespace.rpartition("/")
        if key != self._scheduler.key(key.tokens, namespace):
            return False  # other weights computed it
        wish = Request.new("hint", key.tokens, SamplingParams(max_new_tokens=1), namespace=namespace)
        wish.epoch = epoch
        return self._prefetcher.bring(wish, now)

    # -- at their time --------------------------------------------------------------------------------------------

    @property
    def next_end(self) -> float | None:
        """When the first turn that is waited for is near, or it is time to look at what is retained."""
        ends = [turn.at for turn in self._turns[:1]] + ([] if self._look is None else [self._look])
        return min(ends, default=None)

    def _plan_look(self, now: float) -> None:
        ends = self._pins.next_end_of("retained")
        self._look = None if ends is None else now + max(_LOOK[0] * (ends - now), _LOOK[1])

    def expire(self, now: float, longest: float = inf) -> None:
        """Bring nearer what is soon asked for; give up what is retained for much longer than pays: see :meth:`take`."""
        if self._look is not None and self._look <= now:
            if longest < inf:
                self._pins.give_up(*(now + times * longest for times in _HOPELESS))
            self._plan_look(now)
        while self._turns and self._turns[0].at <= now:
            self._bring(heappop(self._turns).key, now)

    @property
    def _cache(self) -> RadixCache:
        return self._scheduler.cache

    def _whole(self, key: Key) -> int:
        return len(key) - len(key) % self._cache.page_size
