"""Brings what a store has of the prompts that wait to host memory, from where they are loaded like any other.

When a request arrives the store is asked what it has of its prompt beyond what is known; that comes to HOST while the
request waits, as long as the policy says (SGLang's: ``best_effort`` never waits, ``wait_complete`` for all of it,
``timeout`` until all is there or a time is over). It starts with what is there by then; what comes later is kept.

A request may ask that what it leaves be written to the store at once (a *checkpoint*; the name of its last page is its
*handle*), and a later one may wait for that, on this engine or another one with the store.

Like the cache this decides and does nothing: ``questions`` are taken to the store by whoever moves bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from rootcellar.cache import Answer, Key, Prefetch, Question, Reports, Tier
from rootcellar.scheduler.request import Request
from rootcellar.scheduler.scheduler import Scheduler

PrefetchPolicy = Literal["best_effort", "wait_complete", "timeout"]
PREFETCH_POLICIES: tuple[PrefetchPolicy, ...] = get_args(PrefetchPolicy)
STORED, RECOMPUTED = "stored", "recomputed"
"""What became of a dependency: the store has it all; or not, and what is cached nowhere else is computed."""


@dataclass(frozen=True, slots=True)
class PrefetchRules:
    """When a store is asked, and how long a request waits for it.

    ``threshold``: tokens of a prompt that are not known yet; fewer are not asked for. ``timeout``: seconds for so many.
    """

    policy: PrefetchPolicy
    threshold: int
    timeout: Callable[[int], float]


@dataclass(slots=True)
class _Wish:
    """A request whose prompt a store may have more of.

    ``near``: tokens that HOST or DEVICE had when the store was asked; ``since``, ``limit``: when that was, and seconds
    that it waits at most.
    """

    request: Request
    near: int
    since: float
    limit: float
    prefetch: Prefetch | None = None
    check: Question | None = None
    """Asks whether the checkpoint that it depends on is all there; None once that is known."""
    asked: int = 0
    """How often copies had been learned of when the store was asked last."""
    waits: bool = False
    """Whether it is to be asked again when copies were."""


class Prefetcher:
    """What waiting requests want of the store; one for each scheduler."""

    def __init__(self, scheduler: Scheduler, names_of: Callable[[Key], Sequence[bytes]]) -> None:
        """``names_of``: the digests of a key's whole pages."""
        self._scheduler = scheduler
        self._names_of = names_of
        self._learned = 0
        self._rules: PrefetchRules | None = None
        self._serial = 0
        self._questions: list[tuple[int, Question]] = []
        self._wishes: dict[int, _Wish] = {}
        """By the serial of the question, until its request goes on."""

    def open(self, rules: PrefetchRules) -> None:
        """There is a store."""
        self._rules = rules

    def close(self) -> None:
        """There is none any more: nobody waits for it."""
        self._rules = None
        self._questions.clear()
        for serial in list(self._wishes):
            self._go_on(serial)

    @property
    def rules(self) -> PrefetchRules | None:
        """Those in force; None without a store."""
        return self._rules

    @property
    def waiting(self) -> int:
        """Requests of which something is asked or under way."""
        return len(self._wishes)

    @property
    def next_end(self) -> float | None:
        """When a request will have waited long enough; None: none will."""
        ends = [wish.since + wish.limit for wish in self._wishes.values() if wish.limit < inf]
        return min(ends, default=None)

    def bring(self, request: Request, now: float) -> bool:
        """Let come to HOST what the store has of a request that is never run; whether the store is asked."""
        before = self._serial
        self.arrived(request, now, waits=False)
        return self._serial > before

    def arrived(self, request: Request, now: float, *, waits: bool = True) -> None:
        """A request waits (or somebody else for its prompt) from ``now`` on (seconds of the engine's clock)."""
        rules, cache = self._rules, self._scheduler.cache
        check = None if rules is None else self._check_of(request)
        if request.depends is not None and check is None:
            request.dependency = RECOMPUTED
        if rules is None:
            return
        key = request.key(request.matchable)
        hit = cache.match(key)
        known, near = hit.reach(Tier.STORAGE), hit.reach(Tier.HOST)
        question = cache.ask(key, Tier.STORAGE) if len(key) - known >= rules.threshold else None
        asked = check or question
        if asked is None and known - near < rules.threshold:
            return
        self._serial += 1
        patient = waits and rules.policy == "wait_complete" and check is None
        limit = inf if patient else rules.timeout(len(key) - near)
        self._wishes[self._serial] = wish = _Wish(request, near, now, limit, check=check, asked=self._learned)
        if waits and (rules.policy != "best_effort" or check is not None):
            self._scheduler.hold(request)
        if asked is None:
            self._fetch(self._serial, wish, rules)
        else:
            self._questions.append((self._serial, asked))

    def _check_of(self, request: Request) -> Question | None:
        """Asks for all pages of the checkpoint that a request depends on; None: it begins otherwise, or with none."""
        if request.depends is None:
            return None
        key = request.key(request.matchable)
        names, wanted, cache = self._names_of(key), bytes.fromhex(request.depends), self._scheduler.cache
        if wanted not in names:
            return None
        count = names.index(wanted) + 1
        key = key[: count * cache.page_size]
        firsts = tuple(kind.start(len(key)) // cache.page_size for kind in cache.kinds)
        pages = [
            (kind.name, name) for kind, first in zip(cache.kinds, firsts, strict=True) for name in names[first:count]
        ]
        return Question(key, Tier.STORAGE, cache.kinds, cache.page_size, 0, firsts, tuple(pages))

    def ended(self, request: Request) -> None:
        """A request ended: what is under way for it comes all the same; what is to be durable is written down."""
        for serial in [serial for serial, wish in self._wishes.items() if wish.request is request]:
            del self._wishes[serial]
        if self._rules is None or not request.checkpoint:
            return
        cache = self._scheduler.cache
        key = request.key(request.length)
        cache.write_down(key)
        if reach := cache.match(key).length:
            request.handle = self._names_of(key[:reach])[-1].hex()

    def questions(self) -> list[tuple[int, Question]]:
        """What to ask the store, each with its serial, since the last call."""
        questions, self._questions = self._questions, []
        return questions

    def learned(self, reports: Reports) -> None:
        """The cache learned of copies; it is to learn what the store answered: nothing if it has nothing or failed.

        Whoever has all that it waited for goes on.
        """
        self._learned += bool(reports.events)
        for answer in reports.answers:
            self._scheduler.learn(answer.events)  # whoever asked may be gone: others may ask the same
            wish = self._wishes.get(answer.serial)
            if wish is not None and (wish.check is None or self._checked(wish, wish.check, answer)):
                self._fetch(answer.serial, wish, self._rules)
        for serial, wish in list(self._wishes.items()):
            if wish.prefetch is not None and not self._scheduler.cache.pending(wish.prefetch):
                self._go_on(serial)
            elif wish.check is not None and wish.waits and wish.asked < self._learned:
                wish.waits, wish.asked = False, self._learned
                self._questions.append((serial, wish.check))

    def _checked(self, wish: _Wish, check: Question, answer: Answer) -> bool:
        """Whether it is known what becomes of a dependency; else the store is asked again, once copies were made."""
        there = max((len(event.key) for event in answer.events), default=0) == len(check.key)
        shelves = self._scheduler.cache.stats().shelves
        coming = any(shelf.in_flight for (_, tier), shelf in shelves.items() if tier in (Tier.HOST, Tier.STORAGE))
        if not there and self._rules is not None and (coming or wish.asked < self._learned):
            wish.waits = True
            return False
        wish.check, wish.request.dependency = None, STORED if there else RECOMPUTED
        if self._rules is not None and self._rules.policy == "wait_complete":
            wish.limit = inf  # what may not come at all was waited for no longer than a time
        return True

    def expire(self, now: float) -> None:
        """Whoever has waited long enough by ``now`` goes on."""
        for serial, wish in list(self._wishes.items()):
            if now >= wish.since + wish.limit:
                self._go_on(serial)

    def _fetch(self, serial: int, wish: _Wish, rules: PrefetchRules | None) -> None:
        """What the store has of the request is known: bring it closer where that pays."""
        scheduler, request = self._scheduler, wish.request
        if request.lease is None and rules is not None:  # else it computes already what it would wait for
            hit = scheduler.cache.match(request.key(request.matchable))
            near, far = hit.reach(Tier.HOST), hit.reach(Tier.STORAGE)
            if far - near >= rules.threshold:
                decision = scheduler.loads.weigh(Tier.STORAGE, near, far)
                request.decisions.append(decision)
                wish.prefetch = scheduler.cache.prefetch(hit) if decision.load else None
        if wish.prefetch is None:
            self._go_on(serial)

    def _go_on(self, serial: int) -> None:
        wish = self._wishes.pop(serial)
        request = wish.request
        if wish.check is not None:
            request.dependency = RECOMPUTED
        if request.lease is None and request.finish is None:
            there = self._scheduler.cache.match(request.key(request.matchable)).reach(Tier.HOST)
            request.stored = max(0, there - wish.near)
        self._scheduler.hold(request, False)
