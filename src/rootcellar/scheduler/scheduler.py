"""Continuous batching with chunked prefill over the cache's verbs.

A request waits, runs, and ends; when memory runs out the youngest running request is *retracted*: it gives its pages
back (those that were committed stay cached until somebody needs the room) and waits again, first in line, with the
tokens that it has. The oldest is never retracted for a younger one, so something always advances.

Steps of prefill and of decode alternate while there is work for both: a long prompt delays running requests by one
chunk at a time, and a stream of prompts cannot stop them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rootcellar.cache import Hit, Key, RadixCache, Tier
from rootcellar.scheduler.request import Finish, Request, Stage

# More waiting requests than this are taken in order of arrival: matching all of them before each step costs more than
# the better order saves (SGLang draws the same line).
_LPM_LIMIT = 128
# A waiting request is held back while a running one computes a prefix that would save it at least this many tokens.
_WORTH_WAITING = 32

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
        """
        self.cache = cache
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.failed: list[Request] = []
        """Requests that ``plan`` had to end; the engine takes them from here."""
        self.retractions = 0
        self._chunk = chunked_prefill_size
        self._max_running = max_running_requests
        self._rank = POLICIES[schedule_policy]
        self._needs_match = schedule_policy == "lpm" and reuse
        self._reuse = reuse
        self._tiles_of = tiles_of
        self._max_tiles = max_tiles if max_tiles is not None else chunked_prefill_size
        self._arrivals = 0
        self._admissions = 0
        self._admitted: dict[Request, int] = {}
        self._decode_next = False
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
        self._arrivals += 1
        self.waiting.append(request)

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
        request.computed = request.committed = 0
        self.running.remove(request)
        del self._admitted[request]

    def _retract(self, request: Request) -> None:
        self._commit(request, everything=True)
        self._release(request)
        request.stage = Stage.PREFILL_WAITING
        request.retractions += 1
        self.retractions += 1
        self.waiting.insert(0, request)

    def _commit(self, request: Request, *, everything: bool) -> None:
        """Share whole pages that were computed: all of them, or a step's worth at a time when pages are tiny."""
        step = self.cache.page_size if everything else max(self.cache.page_size, 16)
        if request.computed // step > request.committed // step:
            assert request.lease is not None
            self.cache.commit(request.lease, request.key(request.computed))
            request.committed = request.computed - request.computed % self.cache.page_size

    # -- the next step --------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, with slots for all it writes; None when nothing can be computed."""
        self._admit()
        order = (self._decode, self._prefill) if self._decode_next else (self._prefill, self._decode)
        for make in order:
            plan = make()
            if plan is not None:
                self._decode_next = not plan.decode
                return plan
        return None

    def _decode(self) -> Plan | None:
        ready = [r for r in self.running if r.remaining == 1]
        if not ready:
            return None
        chunks = [Chunk(r, r.computed, r.length) for r in self._grow(ready, [1] * len(ready))]
        for chunk in chunks:
            chunk.request.stage = Stage.DECODE_LOOP
        return Plan(tuple(chunks), decode=True) if chunks else None

    def _prefill(self) -> Plan | None:
        tokens, tiles = self._chunk, self._max_tiles
        chosen: list[Request] = []
        counts: list[int] = []
        for request in sorted((r for r in self.running if r.remaining > 1), key=self._admitted.__getitem__):
            n = min(request.remaining, tokens)
            if n < request.remaining and n > self.cache.page_size:
                n -= (
                    request.computed + n
                ) % self.cache.page_size  # end the chunk on a page, so that all of it is shared
            need = self._tiles_of(n)
            if need > tiles or n <= 0:
                break
            tokens, tiles = tokens - n, tiles - need
            chosen.append(request)
            counts.append(n)
        sizes = dict(zip(chosen, counts, strict=True))
        chunks = [Chunk(r, r.computed, r.computed + sizes[r]) for r in self._grow(chosen, counts)]
        for chunk in chunks:
            chunk.request.stage = Stage.PREFILL_FORWARD if chunk.ends else Stage.PREFILL_CHUNKED_FORWARD
        return Plan(tuple(chunks), decode=False) if chunks else None

    def _grow(self, requests: Sequence[Request], counts: Iterable[int]) -> list[Request]:
        """Slots for each request's next tokens, retracting the youngest while there is no room.

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
                self._retract(max(self.running, key=self._admitted.__getitem__))
        failed = set(waiting).difference(grown)
        return [r for r in requests if r.lease is not None and r not in failed]

    def _grow_together(self, requests: Sequence[Request]) -> list[Request]:
        """Slots for the next token of each, in one call of the cache; those that it left without."""
        tight = [r for r in requests if r.lease is not None and r.lease.length == r.computed]
        leases = [r.lease for r in tight if r.lease is not None]
        return [r for r, ok in zip(tight, self.cache.grow_many(leases), strict=True) if not ok]

    # -- admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting requests while a step's worth of prompt, rows and memory are there."""
        budget = self._chunk - sum(r.remaining for r in self.running if r.remaining > 1)
        for request, hit in self._candidates():
            if budget <= 0 or len(self.running) >= self._max_running:
                return
            if self._shares_with_running(request, hit):
                continue
            if not self._start(request, hit):
                return
            budget -= request.remaining

    def _candidates(self) -> list[tuple[Request, Hit]]:
        if not self.admitting or not self.waiting or len(self.running) >= self._max_running:
            return []
        for request in self.waiting:
            request.epoch = self._epoch
        if not self._needs_match or len(self.waiting) > _LPM_LIMIT:
            room = self._max_running - len(self.running)
            first = sorted(self.waiting, key=lambda r: (-r.priority, r.retractions == 0, r.order))[:room]
            return [(r, self.cache.match(r.key(r.matchable))) for r in first]
        hits = [(r, self.cache.match(r.key(r.matchable))) for r in self.waiting]
        return sorted(hits, key=lambda x: (-x[0].priority, x[0].retractions == 0, *self._rank(*x)))

    def _shares_with_running(self, request: Request, hit: Hit) -> bool:
        """Whether a running request is about to compute a prefix that this one could then take from the cache."""
        if not self._reuse:
            return False
        worth = hit.length + max(_WORTH_WAITING, self.cache.page_size)
        limit = request.matchable
        for other in self.running:
            end = min(limit, other.length)
            if other.remaining <= 1 or end < worth:
                continue
            if (other.namespace, other.epoch) != (request.namespace, request.epoch):
                continue
            if np.array_equal(request.ids[:worth], other.ids[:worth]):
                return True
        return False

    def _start(self, request: Request, hit: Hit) -> bool:
        """Open a lease if all that is running can still go on; False leaves everything as it was."""
        lease = self.cache.open(hit, priority=request.priority)
        if lease is None:
            return False
        pending = [request.length - lease.cached, *(r.remaining for r in self.running)]
        reserve = self.cache.page_size * len(pending)
        needs = {kind.name: sum(kind.held(n, self._chunk) for n in pending) + reserve for kind in self.cache.kinds}
        if self.running and not self.cache.has_room(needs):
            self.cache.close(lease)
            return False
        request.lease = lease
        self._namespaces.add(lease.namespace)
        request.computed = request.committed = lease.cached
        if request.cached is None:
            request.cached = min(lease.cached, request.prompt_length)
            request.cached_by_tier = _by_tier(hit, request.cached)
        self.waiting.remove(request)
        self.running.append(request)
        self._admitted[request] = self._admissions
        self._admissions += 1
        return True

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
                self._commit(request, everything=not plan.decode)
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
