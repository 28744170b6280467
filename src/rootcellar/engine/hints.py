"""What callers say of a prompt's future, each answered: how long to keep it, when it comes next, that it may go.

A hint is granted, clipped (for less time, or of less of the prompt), deferred (it will be done later) or refused, and
the answer says why. For the engine's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from heapq import heapify, heappop, heappush
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

    def take(self, tenant: str, key: Key, hints: Mapping[str, float], share: float, now: float) -> list[Reply]:
        """Answer checked ``hints`` on ``key``; ``share``: of what pins may hold, the tenant's."""
        return [self._answer(name, tenant, key, seconds, share, now) for name, seconds in hints.items()]

    def _answer(self, name: str, tenant: str, key: Key, seconds: float, share: float, now: float) -> Reply:
        match name:
            case "pin" | "retain":
                return self._keep(name, tenant, key, seconds, share, now)
            case "next_turn":
                return self._next_turn(tenant, key, seconds, share, now)
            case "demote":
                return self._demote(tenant, key)
            case _:
                return self._prefetch(key, now)

    def _keep(self, name: str, tenant: str, key: Key, seconds: float, share: float, now: float) -> Reply:
        """Pin or retain."""
        sort: Sort = "retained" if name == "retain" else "pin"
        if not seconds:
            found = self._pins.remove(tenant, key, sort)
            return Reply(name, "granted" if found else "refused", "" if found else "there was none")
        time = min(seconds, LONGEST[name])
        whole = self._whole(key)
        tokens, _ = self._pins.add(tenant, key, now + time, share, sort=sort, clip=True)
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

    def _next_turn(self, tenant: str, key: Key, seconds: float, share: float, now: float) -> Reply:
        """Retain till a little after the turn is due; what cannot be is brought from the store before it."""
        self._turns = [turn for turn in self._turns if (turn.tenant, turn.key) != (tenant, key)]
        heapify(self._turns)
        late = max(_LATE[0] * seconds, _LATE[1]) if seconds else 0.0
        kept = self._keep("retain", tenant, key, seconds + late, share, now)
        if 0 < seconds <= LONGEST["next_turn"] and self._may_wait(tenant, key, share):
            heappush(self._turns, _Turn(now + max(0.0, seconds - _LEAD), tenant, key))
            if kept.answer == "refused":
                why = f"{kept.why}; what the store has of it is brought before the turn"
                return Reply("next_turn", "deferred", why, 0, seconds)
        return Reply("next_turn", kept.answer, kept.why, kept.tokens, kept.seconds)

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
        """When the first turn that is waited for is near."""
        return self._turns[0].at if self._turns else None

    def expire(self, now: float) -> None:
        """Bring nearer what is soon asked for."""
        while self._turns and self._turns[0].at <= now:
            self._bring(heappop(self._turns).key, now)

    @property
    def _cache(self) -> RadixCache:
        return self._scheduler.cache

    def _whole(self, key: Key) -> int:
        return len(key) - len(key) % self._cache.page_size
