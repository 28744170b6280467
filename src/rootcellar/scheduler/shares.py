"""Who goes next, and who makes room: equal shares for tenants, and within a tenant for its calls.

A *tenant* is whoever asks (an API key), a *call* one HTTP request or ``generate()`` with all its prompts and answers.
What is shared is rows of the running batch, and with them memory: whoever holds the fewest rows goes first, and among
equals whoever got one longest ago. A tenant's requests are ordered by priority, then by call in the same way, then by
the policy; so one caller, or callers with a request each, are served as if there were no shares. Nothing here measures
time: what is counted is rows given, *admissions*.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from rootcellar.scheduler.plan import tiled
from rootcellar.scheduler.request import Request

Call = tuple[str, int]
Place = tuple[int, ...]
"""A request's place within its call: by priority, then those that lost their memory, then by the policy."""


def call_of(request: Request) -> Call:
    """The call that a request belongs to, with its tenant."""
    return request.tenant, request.call


# Admissions after which a call that never got a row goes before what the policy prefers.
_PATIENCE = 256
# Tenants whose last turn is remembered.
_TENANTS = 4096


class Turns:
    """When each tenant and each waiting call last got a row, in admissions."""

    def __init__(self, rows: int) -> None:
        """``rows``: most that are held at a time."""
        self.now = 0
        self._rows = rows
        self._tenants: dict[str, int] = {}
        self._calls: dict[Call, int] = {}

    def take(self, request: Request) -> None:
        """``request`` got a row."""
        self.now += 1
        self._tenants.pop(request.tenant, None)
        self._tenants[request.tenant] = self.now  # the newest are last
        if len(self._tenants) > _TENANTS:
            del self._tenants[next(iter(self._tenants))]
        self._calls[call_of(request)] = self.now

    def keep(self, calls: Container[Call]) -> None:
        """Forget calls that wait no more."""
        if self._calls:
            self._calls = {call: last for call, last in self._calls.items() if call in calls}

    def tenant(self, tenant: str) -> int:
        """When ``tenant`` last got a row; 0: never, as far as is known."""
        return self._tenants.get(tenant, 0)

    def call(self, first: Request) -> int:
        """The place among its tenant's calls of one that waits with ``first`` in front; the lowest goes first.

        Those that waited too long, the longest first; then those that never got a row, which the policy orders; then
        the others, who wait as many turns as there are rows.
        """
        last = self._calls.get(call_of(first))
        waited = self.now - max(first.since, last or 0)
        if waited >= (_PATIENCE if last is None else self._rows):
            return -waited
        return 1 if last is None else 2


class Held:
    """How many rows of the running batch each tenant and each call holds."""

    def __init__(self, running: Iterable[Request]) -> None:
        self.calls: Counter[Call] = Counter(map(call_of, running))
        self.tenants: Counter[str] = Counter()
        for (tenant, _), rows in self.calls.items():
            self.tenants[tenant] += rows

    def add(self, request: Request, rows: int = 1) -> None:
        """Count a request that started (-1: that runs no more)."""
        self.calls[call_of(request)] += rows
        self.tenants[request.tenant] += rows

    def largest(self, requests: Sequence[Request]) -> list[Request]:
        """Those of ``requests`` (at least one) whose tenant, and in it whose call, holds the most rows."""
        return _most(_most(requests, lambda r: self.tenants[r.tenant]), lambda r: self.calls[call_of(r)])

    def above(self, claimant: Request, running: Iterable[Request]) -> list[Request]:
        """Running requests of those who hold so much more than the claimant's that one should make way for it.

        Two rows more, so that who makes way is never in turn the one to claim; nobody makes way for a call that runs.
        Within a tenant no request makes way for one of lower priority.
        """
        if self.calls[call_of(claimant)]:
            return []
        own = self.tenants[claimant.tenant]
        others = [r for r in running if r.tenant != claimant.tenant and self.tenants[r.tenant] >= own + 2]
        return others or [
            r
            for r in running
            if r.tenant == claimant.tenant and self.calls[call_of(r)] >= 2 and r.priority <= claimant.priority
        ]


def place_of(request: Request) -> Place:
    """A waiting request's place in its call, whatever the cache holds of it."""
    return (-request.priority, request.retractions == 0, request.order)


class Waiting:
    """All that wait, each call's requests in their places; what is asked in each step does not go through all."""

    def __init__(self, changed: Callable[[int], None]) -> None:
        """``changed`` is told how many wait after each change."""
        self.calls: dict[Call, list[Request]] = {}
        self.held: set[Request] = set()
        """Those that wait for something else than a row and memory."""
        self._count = 0
        self._changed = changed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        return itertools.chain.from_iterable(self.calls.values())

    def add(self, request: Request) -> None:
        """Let ``request`` wait. Its priority, order and retractions stay as they are until it is removed."""
        insort(self.calls.setdefault(call_of(request), []), request, key=place_of)
        self._count += 1
        self._changed(self._count)

    def remove(self, request: Request) -> None:
        """``request``, which is there, waits no more."""
        self.held.discard(request)
        call = call_of(request)
        line = self.calls[call]
        del line[bisect_left(line, place_of(request), key=place_of)]
        self._count -= 1
        if not line:
            del self.calls[call]
        self._changed(self._count)

    def hold(self, request: Request, held: bool) -> None:
        """Whether a request that may be there waits for something else than a row and memory."""
        if held:
            self.held.add(request)
        else:
            self.held.discard(request)

    def places(self, tenant: str, most: int) -> int:
        """How many places of a queue the requests of ``tenant`` take; one call takes ``most`` at the most.

        So no call, however many requests it has, leaves none to the others.
        """
        return sum(min(most, len(line)) for call, line in self.calls.items() if call[0] == tenant)


class Lines:
    """Waiting requests in the order of their turns, which depends on who has got a row meanwhile."""

    def __init__(
        self, calls: dict[Call, list[Request]], place: Callable[[Request], Place], held: Held, turns: Turns
    ) -> None:
        """``calls``: the requests of each, the last in its place first; they are taken from the lists."""
        self._calls = calls
        self._place = place
        self._held = held
        self._turns = turns
        self._lines: dict[str, list[tuple[Place, Call]]] = {}
        for call in calls:
            self._lines.setdefault(call[0], []).append((self._standing(call), call))
        for line in self._lines.values():
            heapify(line)
        turns.keep(calls)

    @property
    def none_may_claim(self) -> bool:
        """Whether nobody makes way for a call that waits: each has something running, or all have equally much.

        So it is when no call has two rows, each tenant that waits has one, and none has two more than it: see
        :meth:`Held.above` and :class:`Claims`.
        """
        held = self._held
        if all(held.calls[call] for call in self._calls):
            return True
        least = max(1, max(held.tenants.values(), default=0) - 1)
        return max(held.calls.values(), default=0) < 2 and all(held.tenants[name] >= least for name in self._lines)

    def next(self) -> Request | None:
        """Whose turn it is; it leaves the line. Call :meth:`settle` before the next."""
        if not self._lines:
            return None
        tenant = min(self._lines, key=lambda t: (self._held.tenants[t], self._turns.tenant(t)))
        _, call = heappop(self._lines[tenant])
        return self._calls[call].pop()

    def upcoming(self, most: int) -> list[Request]:
        """The first ``most`` in their turns, as if each got its row and nobody gave one back; they stay in line."""
        lines = {tenant: line.copy() for tenant, line in self._lines.items()}
        rows, taken = self._held.tenants.copy(), Counter[Call]()
        found: list[Request] = []
        while lines and len(found) < most:
            tenant = min(lines, key=lambda t: (rows[t], self._turns.tenant(t)))
            _, call = heappop(lines[tenant])
            rows[tenant] += 1
            taken[call] += 1
            found.append(self._calls[call][-taken[call]])
            if taken[call] < len(self._calls[call]):
                heappush(lines[tenant], (self._standing(call, taken[call]), call))
            elif not lines[tenant]:
                del lines[tenant]
        return found

    def settle(self, request: Request) -> None:
        """The request that came last has got its row or not: its call is in line again."""
        call = call_of(request)
        if call[0] not in self._lines:
            return
        if self._calls[call]:
            heappush(self._lines[call[0]], (self._standing(call), call))
        elif not self._lines[call[0]]:
            del self._lines[call[0]]

    def leave(self, tenant: str) -> None:
        """No more of this tenant's requests now."""
        self._lines.pop(tenant, None)

    def _standing(self, call: Call, started: int = 0) -> Place:
        """A call's place in its tenant's line, after so many of its requests."""
        first = self._calls[call][-1 - started]
        place = self._place(first)
        return (place[0], self._held.calls[call] + started, self._turns.call(first), *place[1:])


class Budget:
    """Prompt tokens that may still be started: a step's worth, and a step's worth of short prompts beside long ones.

    A tenant that has nothing to prefill may always start one request, and so may a call beside a single other: the
    step's tokens are then shared anew.
    """

    def __init__(self, tokens: int, running: Iterable[Request]) -> None:
        self._left = self._left_for_short = tokens
        self._short = tokens // 2
        self._tenants: set[str] = set()
        self._calls: set[Call] = set()
        for request in running:
            if request.length - request.computed > 1:
                self.take(request)

    def take(self, request: Request) -> None:
        """Count what a running request has to prefill."""
        n = request.remaining
        self._left -= n
        self._left_for_short -= n if n <= self._short else 0
        self._tenants.add(request.tenant)
        self._calls.add(call_of(request))

    def allows(self, request: Request, cached: int) -> bool:
        """Whether a request of which ``cached`` tokens are there may start."""
        n = request.length - cached
        if self._left > 0 or n <= min(self._short, self._left_for_short) or request.tenant not in self._tenants:
            return True
        return len(self._calls) == 1 and call_of(request) not in self._calls


def portions(prefilling: Sequence[Request], tokens: int, turn: int) -> dict[Request, int]:
    """How many of a step's ``tokens`` each prefilling request gets; ``prefilling``: the oldest first, in its order.

    Equal shares for tenants; what one does not need is the others'. Of a tenant's share half goes to its requests in
    order of age and half to those that have least left: a short prompt does not wait for a long one, and the long one
    goes on. ``turn`` counts steps: where there are fewer tokens than tenants they take turns.
    """
    given = dict.fromkeys(prefilling, 0)
    wants: dict[str, int] = {}
    for request in prefilling:
        wants[request.tenant] = wants.get(request.tenant, 0) + request.remaining
    tenants = sorted(wants, key=wants.__getitem__)
    if tokens < len(tenants):
        tenants = tenants[turn % len(tenants) :] + tenants[: turn % len(tenants)]
    for i, tenant in enumerate(tenants):
        share = min(wants[tenant], -(-tokens // (len(tenants) - i)))
        tokens -= share
        own = prefilling if len(tenants) == 1 else [r for r in prefilling if r.tenant == tenant]
        by_age = _hand_out(own, given, share - share // 2) + share // 2
        _hand_out(sorted(own, key=lambda r: r.remaining), given, by_age)
    return given


def _hand_out(requests: Iterable[Request], given: dict[Request, int], tokens: int) -> int:
    """Give each what it still wants while there are tokens; those that are left."""
    for request in requests:
        if not tokens:
            break
        more = min(tokens, request.remaining - given[request])
        given[request] += more
        tokens -= more
    return tokens


def light(prefilling: Sequence[Request], tokens: int) -> list[Request]:
    """The prefilling requests of those who want little: at most ``tokens`` in all for a tenant, as they cost.

    Of a tenant that wants more, its calls that want little beside others that do not, up to as many tokens.
    """
    tenants: dict[str, int] = {}
    calls: dict[Call, int] = {}
    for request in prefilling:
        tenants[request.tenant] = tenants.get(request.tenant, 0) + tiled(request.remaining)
        call = call_of(request)
        calls[call] = calls.get(call, 0) + tiled(request.remaining)
    mixed = {call[0] for call, wanted in calls.items() if wanted > tokens}
    left = dict.fromkeys(tenants, tokens)
    chosen = []
    for request in prefilling:
        tenant = request.tenant
        if tenants[tenant] > tokens:
            if tenant not in mixed or calls[call_of(request)] > tokens or tiled(request.remaining) > left[tenant]:
                continue
            left[tenant] -= tiled(request.remaining)
        chosen.append(request)
    return chosen


def _most(requests: Sequence[Request], count: Callable[[Request], int]) -> list[Request]:
    most = max(map(count, requests))
    return [r for r in requests if count(r) == most]


def beside(first: Sequence[Request], others: Sequence[Request], tokens: int) -> list[Request]:
    """Those of ``others`` that may share the small step of ``first``: of tenants with none there, a little each."""
    there = {request.tenant for request in first}
    return [request for request in light(others, tokens) if there and request.tenant not in there]


def jumpers(prefilling: Sequence[Request], little: int, wait: bool, jumped: Container[str]) -> list[Request]:
    """Requests of those who want little, where they would otherwise share a large step or ``wait`` for another.

    Those of the tenants that want least, and as much of others: so the step is as short as theirs alone, nearly. Not of
    who ``jumped`` already. ``little``: tokens that are more than little.
    """
    wants: dict[str, int] = {}
    for request in prefilling:
        if request.tenant not in jumped:
            wants[request.tenant] = wants.get(request.tenant, 0) + tiled(request.remaining)
    if not wants:
        return []
    most = min(little, *wants.values())
    first = [r for r in light(prefilling, most) if r.tenant not in jumped]
    rest = sum(tiled(r.remaining) for r in prefilling) - sum(tiled(r.remaining) for r in first)
    return first if wait or rest >= little else []
