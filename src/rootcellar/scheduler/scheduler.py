"""Continuous batching with chunked prefill over the cache's verbs.

A request waits, runs, and ends; when memory runs out the youngest running request of whoever has the most of them is
*retracted*: it gives its pages back (those that were committed stay cached until somebody needs the room) and waits
again, first in its call's line, with the tokens that it has. One that is left alone is never retracted for want of
memory, so something always advances.

Steps of prefill and of decode alternate while there is work for both: a long prompt delays running requests by one
chunk at a time, and a stream of prompts cannot stop them. ``shares.py`` says whose turn it is: rows, and the tokens of
a prefill step, are shared between tenants and, within a tenant, between calls. Short prompts of those who want little
get a step of their own, before a large one and never two in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rootcellar.cache import Hit, Key, RadixCache, Tier
from rootcellar.scheduler.request import Finish, Request, Stage
from rootcellar.scheduler.shares import Budget, Held, Lines, Place, Turns, Waiting, call_of, light, place_of, portions
from rootcellar.scheduler.snapshots import Snapshots

# More waiting requests than this are taken in order of arrival: matching all of them before each step costs more than
# the better order saves (SGLang draws the same line).
_LPM_LIMIT = 128
# A waiting request is held back while a running one computes a prefix that would save it at least this many tokens.
_WORTH_WAITING = 32
# Waiting requests that are passed over in one plan: the step has no tokens left for them, or they are held back.
_LOOK = 128

POLICIES: dict[str, Callable[[Request, Hit], tuple[int, ...]]] = {
    "lpm": lambda request, hit: (-hit.length, request.order),
    "fcfs": lambda request, _hit: (request.order,),
}


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a request, to be computed in one step."""

    request: Request
    start: int
    stop: int

    @property
    def ends(self) -> bool:
        """Whether the step gives this request's next token."""
        return self.stop == self.request.length


@dataclass(frozen=True)
class Plan:
    """One step: chunks of several requests; ``decode`` when each is a single token."""

    chunks: tuple[Chunk, ...]
    decode: bool


class Scheduler:
    """Decides; the engine carries out.

    ``plan()`` gives the next step, ``advance()`` takes what it produced. In between, ``add``, ``abort`` and ``finish``
    may be called; nothing here waits or measures time.
    """

    def __init__(
        self,
        cache: RadixCache,
        *,
        chunked_prefill_size: int,
        max_running_requests: int,
        schedule_policy: str = "lpm",
        reuse: bool = True,
        tiles_of: Callable[[int], int] = lambda tokens: tokens,
        max_tiles: int | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        """Schedule over ``cache``.

        Args:
            cache: the cache.
            chunked_prefill_size: most prompt tokens in one step.
            max_running_requests: most requests that hold a lease.
            schedule_policy: a name in ``POLICIES``.
            reuse: whether the cache shares anything; if not, no request waits for another's prefix.
            tiles_of: tiles that so many tokens of one request take in a prefill step.
            max_tiles: most tiles in a prefill step; None: as many as tokens.
            snapshots: where requests leave recurrent states; None: the model has none.
        """
        self.cache = cache
        self.waiting = Waiting()
        self.running: list[Request] = []
        self.failed: list[Request] = []
        """Requests that ``plan`` had to end; the engine takes them from here."""
        self.retracted: list[Request] = []
        """Requests that lost their memory; the engine takes them from here."""
        self.retractions = 0
        self._chunk = chunked_prefill_size
        # Whoever wants no more tokens than this wants little: an eighth of a step, at least what a tile holds.
        self._little = min(chunked_prefill_size, max(16, chunked_prefill_size // 8))
        self._max_running = max_running_requests
        self._rank = POLICIES[schedule_policy]
        self._needs_match = schedule_policy == "lpm" and reuse
        self._reuse = reuse
        self._tiles_of = tiles_of
        self._max_tiles = max_tiles if max_tiles is not None else chunked_prefill_size
        self._snapshots = snapshots
        self._arrivals = 0
        self._turns = Turns(max_running_requests)
        self._admitted: dict[Request, tuple[int, int]] = {}
        """Of each running request: its place in the order of admission, and the plans made before."""
        self._plans = 0
        self._decode_next = False
        self._jumped = False
        """Whether the last step was one of those that want little."""
        self._settled = False
        """Whether all rows are taken and nobody has a claim on one, until a request comes or gives its row back."""
        self._epoch = ""
        self._namespaces: set[str] = set()
        self.admitting = True
        """False keeps waiting requests waiting; running ones go on."""

    # -- requests come and go ------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        """Let ``request`` wait for its turn."""
        request.order = self._arrivals
        request.since = self._turns.now
        self._arrivals += 1
        request.epoch = self._epoch
        self.waiting.add(request)
        self._settled = False

    def finish(self, request: Request, finish: Finish) -> None:
        """End a waiting or running request; what it computed stays cached. One that ended already stays as it is."""
        if request.stage is Stage.FINISHED:
            return
        request.finish = finish
        if request.lease is None:
            self.waiting.remove(request)
            request.stage = Stage.FINISHED
        else:
            self._end(request)

    def key(self, tokens: ArrayLike, namespace: str) -> Key:
        """The cache key that a request for ``tokens`` would have now."""
        return Key(tokens, f"{self._epoch}/{namespace}")

    def retract_all(self) -> None:
        """Let every running request give its pages back and wait again, the oldest first in line."""
        for request in sorted(self.running, key=self._admitted.__getitem__, reverse=True):
            self._retract(request)

    def set_epoch(self, epoch: str) -> None:
        """From now on KV is computed with other weights: nothing cached before is ever a hit again.

        Requests that run go on with what they have; what they commit is seen by nobody. Retract them first when they
        should be computed anew.
        """
        if epoch == self._epoch:
            return
        self._epoch = epoch
        for request in self.waiting:
            request.epoch = epoch
        for namespace in self._namespaces:
            self.cache.drop_namespace(namespace)
        self._namespaces = {r.lease.namespace for r in self.running if r.lease is not None}

    def _end(self, request: Request) -> None:
        self._commit(request, everything=True)
        self._release(request)
        request.stage = Stage.FINISHED

    def _release(self, request: Request) -> None:
        assert request.lease is not None
        self.cache.close(request.lease)
        request.lease = None
        request.computed = request.committed = request.resumable = request.branch = 0
        self.running.remove(request)
        del self._admitted[request]
        self._settled = False

    def _retract(self, request: Request) -> None:
        self._commit(request, everything=True)
        self._release(request)
        request.stage = Stage.PREFILL_WAITING
        request.retractions += 1
        self.retractions += 1
        request.epoch = self._epoch
        self.waiting.add(request)
        self.retracted.append(request)

    def _commit(self, request: Request, *, everything: bool, decode: bool = False) -> None:
        """Share whole pages that were computed: all of them, or a step's worth at a time when pages are tiny.

        ``decode``: a recurrent state is left only at its interval.
        """
        step = self.cache.page_size if everything else max(self.cache.page_size, min(16, self._chunk))
        snapshot = self._snapshots is not None and self._snapshots.due(request, decode)
        if request.computed // step > request.committed // step or snapshot:
            assert request.lease is not None
            self.cache.commit(request.lease, request.key(request.computed), snapshot=snapshot)
            request.committed = request.computed - request.computed % self.cache.page_size
            if snapshot:
                request.resumable = request.computed

    # -- the next step --------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, with slots for all it writes; None when nothing can be computed."""
        self._plans += 1
        started = self._turns.now
        self._admit()
        decoding = [r for r in self.running if r.length - r.computed == 1]
        prefilling = [r for r in self.running if r.length - r.computed > 1] if len(decoding) < len(self.running) else []
        if self._turns.now > started and not self._decode_next:
            # What is all cached but its last token need not wait for the next decode step.
            prefilling += [r for r in decoding if self._admitted[r][1] == self._plans]
        prefilling.sort(key=self._admitted.__getitem__)
        first = self._who_jumps(prefilling, bool(decoding))
        if first and (plan := self._prefill(first)) is not None:
            self._jumped = True
            self._decode_next = self._decode_next or len(first) == len(prefilling)
            return plan
        self._jumped = False
        for decode in (self._decode_next, not self._decode_next):
            plan = self._decode(decoding) if decode else self._prefill(prefilling)
            if plan is not None:
                self._decode_next = not decode
                return plan
        return None

    def _who_jumps(self, prefilling: list[Request], decoding: bool) -> list[Request]:
        """Requests of those who want little, where they would otherwise wait for a decode step or share a large one."""
        if self._jumped or not prefilling:
            return []
        first = light(prefilling, self._little)
        rest = sum(r.remaining for r in prefilling) - sum(r.remaining for r in first)
        return first if (decoding and self._decode_next) or 2 * rest >= self._chunk else []

    def _decode(self, decoding: list[Request]) -> Plan | None:
        if not decoding:
            return None
        chunks = [Chunk(r, r.computed, r.length) for r in self._grow(decoding, [1] * len(decoding))]
        for chunk in chunks:
            chunk.request.stage = Stage.DECODE_LOOP
        return Plan(tuple(chunks), decode=True) if chunks else None

    def _prefill(self, prefilling: list[Request]) -> Plan | None:
        tiles, spare = self._max_tiles, 0
        counts: dict[Request, int] = {}
        for request, n in portions(prefilling, self._chunk, self._plans).items():
            whole = n + spare
            n = self._end_well(request, min(request.remaining, whole))
            need = self._tiles_of(n)
            if n <= 0 or need > tiles:
                continue
            tiles, spare = tiles - need, whole - n
            counts[request] = n
        chunks = [Chunk(r, r.computed, r.computed + counts[r]) for r in self._grow(list(counts), counts.values())]
        for chunk in chunks:
            chunk.request.stage = Stage.PREFILL_FORWARD if chunk.ends else Stage.PREFILL_CHUNKED_FORWARD
        return Plan(tuple(chunks), decode=False) if chunks else None

    def _end_well(self, request: Request, n: int) -> int:
        """Of a chunk of up to ``n`` tokens, as many as end on a page, so that all of it is shared, or at a snapshot."""
        if self.cache.page_size < n < request.remaining:
            n -= (request.computed + n) % self.cache.page_size
        return n if self._snapshots is None else self._snapshots.stop(request, request.computed + n) - request.computed

    def _grow(self, requests: Sequence[Request], counts: Iterable[int]) -> list[Request]:
        """Slots for each request's next tokens, retracting the youngest of whoever has most while there is no room.

        Returns those that got theirs and still run.
        """
        needs = dict(zip(requests, counts, strict=True))
        grown: list[Request] = []
        waiting = self._grow_together(requests) if all(n == 1 for n in needs.values()) else list(requests)
        for request in sorted(waiting, key=self._admitted.__getitem__):
            while request.lease is not None:
                # A lease keeps slots that it grew for a step that was then not run.
                missing = request.computed + needs[request] - request.lease.length
                if missing <= 0 or self.cache.grow(request.lease, missing):
                    grown.append(request)
                    break
                if len(self.running) == 1:
                    # Nobody is left to make room: something else holds the pages. Never wait for it in silence.
                    message = (
                        f"the KV cache has no room for request {request.rid} although nothing else runs "
                        f"({self.cache.available_tokens()} tokens available): raise max_total_tokens"
                    )
                    self.finish(request, Finish.abort("no_room", message))
                    self.failed.append(request)
                    break
                self._retract(self._youngest(Held(self.running).largest(self.running)))
        failed = set(waiting).difference(grown)
        return [r for r in requests if r.lease is not None and r not in failed]

    def _youngest(self, requests: Iterable[Request]) -> Request:
        return max(requests, key=self._admitted.__getitem__)

    def _grow_together(self, requests: Sequence[Request]) -> list[Request]:
        """Slots for the next token of each, in one call of the cache; those that it left without."""
        tight = [r for r in requests if r.lease is not None and r.lease.length == r.computed]
        leases = [r.lease for r in tight if r.lease is not None]
        return [r for r, ok in zip(tight, self.cache.grow_many(leases), strict=True) if not ok]

    # -- admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting requests, in their turns, while a step's worth of prompt, rows and memory are there.

        The first of a tenant that finds no row or no room is waited for: no other of that tenant passes it, and of
        other tenants only the first of those who have nothing running.
        """
        if self._settled or not self.admitting or not self.waiting:
            return
        held = Held(self.running)
        lines, hits = self._lines(held)
        self._settled = len(self.running) >= self._max_running and lines.all_served
        budget = Budget(self._chunk, self.running)
        looks, stuck = _LOOK, False
        while looks and (request := lines.next()) is not None:
            if stuck and held.tenants[request.tenant]:
                return
            hit = hits.get(request) or self.cache.match(request.key(request.matchable))
            if self._shares_with_running(request, hit) or not budget.allows(request, hit.length):
                looks -= 1
                lines.settle(request)
            elif self._start(request, hit) or self._claim(request, hit, held):
                held.add(request)
                budget.take(request)
                lines.settle(request)
            else:
                stuck = True
                lines.leave(request.tenant)

    def _lines(self, held: Held) -> tuple[Lines, dict[Request, Hit]]:
        """All that wait, in line, and their hits where the policy asks for them and somebody may start."""
        if self._needs_match and len(self.waiting) <= _LPM_LIMIT and len(self.running) < self._max_running:
            hits = {r: self.cache.match(r.key(r.matchable)) for r in self.waiting}

            def place(request: Request) -> Place:
                return (*place_of(request)[:2], *self._rank(request, hits[request]))

            ranked = {call: sorted(line, key=place, reverse=True) for call, line in self.waiting.calls.items()}
            return Lines(ranked, place, held, self._turns), hits
        reverse = {call: line[::-1] for call, line in self.waiting.calls.items()}
        return Lines(reverse, place_of, held, self._turns), {}

    def _claim(self, request: Request, hit: Hit, held: Held) -> bool:
        """Start a request of somebody who has nothing running, in place of the youngest of whoever has most.

        False, and nothing changed, when that cannot be enough. Once in a request's life: it is started or waits.
        """
        if request.claimed:
            return False
        running, after, going = list(self.running), Held(self.running), list[Request]()
        lacking = max(self._needs(request, hit.length).values(), default=0) + hit.length - self.cache.available_tokens()
        while not going or len(running) >= self._max_running or lacking > 0:
            above = after.above(request, running)
            if not above and not after.tenants[request.tenant]:
                above = self._had_their_turn(request, hit, running)
            if not above:
                return False
            gone = self._youngest(after.largest(above))
            running.remove(gone)
            after.add(gone, -1)
            going.append(gone)
            assert gone.lease is not None
            lacking -= gone.length - gone.lease.cached + self.cache.page_size
        request.claimed = True
        for gone in going:
            self._retract(gone)
            held.add(gone, -1)
        return self._start(request, hit)

    def _had_their_turn(self, request: Request, hit: Hit, running: list[Request]) -> list[Request]:
        """Running requests of other tenants that had as many steps as ``request`` asks for, and may wait as long."""
        prefill = -(-(request.length - hit.length) // self._chunk)
        steps = max(1, prefill + request.sampling.max_new_tokens - request.generated - 1)
        served = (r for r in running if r.tenant != request.tenant and r.stage is not Stage.PREFILL_WAITING)
        return [r for r in served if self._plans - self._admitted[r][1] >= steps]

    def _shares_with_running(self, request: Request, hit: Hit) -> bool:
        """Whether a running request is about to compute a prefix that this one could then take from the cache."""
        if not self._reuse:
            return False
        little = request.length - hit.length <= self._little
        worth = hit.length + max(_WORTH_WAITING, self.cache.page_size)
        limit = request.matchable
        for other in self.running:
            end = min(limit, other.length)
            if other.remaining <= 1 or end < worth:
                continue
            if call_of(other) != call_of(request) and (little or other.tenant != request.tenant):
                continue  # nobody is kept waiting by others for what is soon computed, or by another tenant at all
            if (other.namespace, other.epoch) != (request.namespace, request.epoch):
                continue
            if np.array_equal(request.ids[:worth], other.ids[:worth]):
                if self._snapshots is not None:
                    self._meet(request.ids[:end], other)
                return True
        return False

    def _meet(self, ids: NDArray[np.int64], other: Request) -> None:
        """Let a running request leave a state where one that waits for it will go another way."""
        differs = ids != other.ids[: len(ids)]
        shared = int(differs.argmax()) if differs.any() else len(ids)
        shared -= shared % self.cache.page_size
        if shared > other.computed and not other.computed < other.branch < shared:
            other.branch = shared

    def _start(self, request: Request, hit: Hit) -> bool:
        """Open a lease if all that is running can still go on; False leaves everything as it was."""
        if len(self.running) >= self._max_running:
            return False
        room = self._needs(request, hit.length) if self.running else None
        lease = self.cache.open(hit, priority=request.priority, room=room)
        if lease is None:
            return False
        request.lease = lease
        self._namespaces.add(lease.namespace)
        request.computed = request.committed = request.resumable = lease.cached
        request.branch = hit.branch
        if request.cached is None:
            request.cached = min(lease.cached, request.prompt_length)
            request.cached_by_tier = _by_tier(hit, request.cached)
        self.waiting.remove(request)
        self.running.append(request)
        self._turns.take(request)
        self._admitted[request] = self._turns.now, self._plans
        return True

    def _needs(self, request: Request, cached: int) -> dict[str, int]:
        """Tokens that ``request`` and all that run will hold more of each paged kind until they decode."""
        pending = [request.length - cached, *(r.remaining for r in self.running)]
        reserve = self.cache.page_size * len(pending)
        return {
            kind.name: sum(kind.held(n, self._chunk) for n in pending) + reserve
            for kind in self.cache.kinds
            if kind.rule != "recurrent"
        }

    # -- after the step -------------------------------------------------------------------------------------------

    def advance(self, plan: Plan, tokens: Sequence[int]) -> list[Request]:
        """Take what ``plan`` computed; ``tokens[i]`` was chosen for chunk i (ignored where the chunk does not end).

        Returns the requests that got a token or ended, in the order of the chunks.
        """
        moved: list[Request] = []
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            request = chunk.request
            request.computed = chunk.stop
            if chunk.ends:
                request.score_from = None
                if request.sampling.max_new_tokens == 0:
                    request.finish = Finish("length")
                else:
                    request.append(int(token))
                moved.append(request)
            if request.finish is not None:
                self._end(request)
            else:
                self._commit(request, everything=not plan.decode, decode=plan.decode)
        return moved


def _by_tier(hit: Hit, cached: int) -> dict[str, int]:
    """Which tier gave how many of the ``cached`` tokens, nearest first; SGLang's names of tiers."""
    parts: dict[str, int] = {}
    counted = 0
    for tier in (Tier.DEVICE, Tier.HOST, Tier.STORAGE):
        reach = min(hit.reach(tier), cached)
        parts[tier.name.lower()] = max(0, reach - counted)
        counted = max(counted, reach)
    return parts
