"""Continuous batching with chunked prefill over the cache's verbs.

A request waits, runs, and ends; when memory runs out the youngest running request of whoever has the most of them is
*retracted*: it gives its pages back (those that were committed stay cached until somebody needs the room) and waits
again, first in its call's line, with the tokens that it has. One that is left alone is never retracted for want of
memory, so something always advances.

Steps of prefill and of decode alternate while there is work for both: a long prompt delays running requests by one
chunk at a time, and a stream of prompts cannot stop them. ``shares.py`` says whose turn it is: rows, and the tokens of
a prefill step, are shared between tenants and, within a tenant, between calls. Short prompts of those who want little
get a step of their own, before a large one: each tenant once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

from numpy.typing import ArrayLike

from rootcellar.cache import Event, Hit, Key, RadixCache, Tier
from rootcellar.scheduler.ahead import chunks_ahead
from rootcellar.scheduler.claims import Admission, Claims
from rootcellar.scheduler.cutting import Cutter
from rootcellar.scheduler.foresight import Foresight
from rootcellar.scheduler.guessing import Guesses, fitting, give_back
from rootcellar.scheduler.loads import Loads
from rootcellar.scheduler.placeholders import outside
from rootcellar.scheduler.plan import POLICIES, Chunk, Follow, Plan, decode_step, little_of, new_chunk, room_for
from rootcellar.scheduler.request import Finish, Request
from rootcellar.scheduler.shares import Budget, Held, Lines, Place, Turns, Waiting, beside, jumpers, place_of
from rootcellar.scheduler.sharing import Sharing, note_cached, note_met
from rootcellar.scheduler.snapshots import Snapshots
from rootcellar.scheduler.stages import Stage

# More waiting requests than this are taken in order of arrival: matching all costs more than it saves (SGLang's line).
_LPM_LIMIT = 128
# Waiting requests that are passed over in one plan: the step has no tokens left for them, or they are held back.
_LOOK = 128


class Scheduler:
    """Decides; the engine carries out: ``plan()`` gives the next step, ``advance()`` takes what it produced.

    In between, ``add``, ``finish`` and ``learn`` may be called; nothing here waits or measures time.
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
        loads: Loads | None = None,
        guesses: Guesses | None = None,
        reserved: int = 0,
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
            loads: says what farther tiers give; None: all that they have.
            guesses: says what decoding requests may say next; None: a step gives each one token.
            reserved: tokens of each running answer yet to come that whoever starts leaves room for.
        """
        self.cache = cache
        self._foresight = Foresight(cache)
        self.waiting = Waiting(self._foresight.look)
        self.running: list[Request] = []
        """Requests that hold a lease, in the order in which they got it."""
        self.loading: dict[Request, Hit] = {}
        """Those of them whose lease is not ready, with what they hit."""
        self.giving: set[Request] = set()
        """Requests that are computed, for another node that does not have all of it yet. They hold no lease."""
        self.failed: list[Request] = []
        """Requests that ``plan`` had to end; the engine takes them from here."""
        self.retracted: list[Request] = []
        """Requests that lost their memory; the engine takes them from here."""
        self.make_way: Callable[[], bool] = lambda: False
        """Lets go of something that is kept in the cache though nobody runs with it; False: there is nothing."""
        self.retractions = 0
        self._chunk = chunked_prefill_size
        self._little = little_of(chunked_prefill_size)
        self._max_running = max_running_requests
        self._rank = POLICIES[schedule_policy]
        self._needs_match = schedule_policy == "lpm" and reuse
        self._sharing = Sharing(reuse, self._little, cache.page_size, snapshots is not None)
        self.loads = loads or Loads.of_all()
        self.guesses = guesses
        self._kept = reserved
        # Tokens after which a decoding request commits: whole pages, or several at a time when they are tiny.
        self._stride = max(cache.page_size, min(16, chunked_prefill_size))
        most = max_tiles if max_tiles is not None else chunked_prefill_size
        self.cutter = Cutter(chunked_prefill_size, most, tiles_of, cache.page_size, snapshots)
        self._snapshots = snapshots
        self._arrivals = self._plans = 0
        self._turns = Turns(max_running_requests)
        self._admitted: dict[Request, Admission] = {}
        self._claims = Claims(chunked_prefill_size, max_running_requests, cache.page_size)
        self._decode_next = False
        self._jumped: set[str] = set()
        """Tenants that had a step for what is little since the last other one."""
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
        request.order, request.since, request.epoch = self._arrivals, self._turns.now, self._epoch
        self._arrivals += 1
        self.waiting.add(request)
        self._foresight.changed()
        self._settled = False

    def finish(self, request: Request, finish: Finish) -> None:
        """End a waiting or running request; what it computed stays cached. One that ended already stays as it is."""
        if request.stage is Stage.FINISHED:
            return
        request.finish = finish
        if request.lease is None:
            if request in self.giving:
                self.giving.remove(request)
            else:
                self.waiting.remove(request)
                self._foresight.changed()
            request.enter(Stage.FINISHED)
        else:
            self._end(request)

    def hold(self, request: Request, held: bool = True) -> None:
        """Do not start a waiting request while it is held."""
        self.waiting.hold(request, held)
        self._settled = False

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

    def learn(self, events: Iterable[Event]) -> None:
        """Take in what the movers saw: who has all that it waited for may be planned, who lost it waits again."""
        for event in events:
            self.cache.learn(event)
            self._foresight.changed()
        for request, hit in list(self.loading.items()):
            assert request.lease is not None
            if request.lease.lost:
                request.lost = hit.reach(Tier.HOST)
                self._release(request)
                self._wait_again(request)
            elif request.lease.ready:
                del self.loading[request]
                note_cached(request, hit)

    @property
    def awaits_bytes(self) -> bool:
        """Whether bytes move, so that there will be more room: copies to the device for requests, or only in the way of
        them, or to the host, or to another node.
        """  # fmt: skip
        flying = any(s.in_flight for (_, tier), s in self.cache.stats().shelves.items() if tier is Tier.DEVICE)
        return bool(flying or self.loading or self.giving or self.waiting.held)

    def _end(self, request: Request) -> None:
        self._commit(request, everything=True)
        if self.guesses is not None:
            self.guesses.ended(request)
        self._release(request)
        request.enter(Stage.FINISHED)

    def _give(self, request: Request) -> None:
        """The prompt is computed; it stays until another node has what it needs of it."""
        request.finish = None
        self._commit(request, everything=True)
        self._release(request)
        request.enter(Stage.PREFILL_TRANSFER_KV_CACHE)
        self.giving.add(request)

    def _release(self, request: Request) -> None:
        assert request.lease is not None
        self.cache.close(request.lease)
        request.lease = None
        request.computed = request.committed = request.resumable = request.branch = request.slots = 0
        self.running.remove(request)
        self._foresight.changed()
        self.loading.pop(request, None)
        del self._admitted[request]
        self._settled = False

    def _retract(self, request: Request) -> None:
        self._commit(request, everything=True)
        self._release(request)
        request.retractions += 1
        self.retractions += 1
        self._wait_again(request)
        self.retracted.append(request)

    def _wait_again(self, request: Request) -> None:
        request.enter(Stage.PREFILL_WAITING)
        request.epoch = self._epoch
        self.waiting.add(request)

    def _commit(self, request: Request, *, everything: bool, decode: bool = False) -> None:
        """Share whole pages that were computed: all of them, or a step's worth at a time when pages are tiny.

        ``decode``: a recurrent state is left only at its interval.
        """
        step = self.cache.page_size if everything else self._stride
        snapshot = self._snapshots is not None and self._snapshots.due(request, decode)
        if request.computed // step > request.committed // step or snapshot:
            assert request.lease is not None
            self.cache.commit(request.lease, request.key(request.computed), snapshot=snapshot)
            request.committed = request.computed - request.computed % self.cache.page_size
            if snapshot:
                request.resumable = request.computed
        request.commit_at = (request.committed // self._stride + 1) * self._stride

    # -- the next step --------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, with slots for all it writes; None when nothing can be computed."""
        self._plans += 1
        started = self._turns.now
        self._admit()
        ready = [r for r in self.running if r not in self.loading] if self.loading else self.running
        ready = self.cutter.able(ready)
        decoding = [r for r in ready if r.length - r.computed == 1]
        prefilling = [r for r in ready if r.length - r.computed > 1] if len(decoding) < len(ready) else []
        # What is all cached but its last token need not wait for the next decode step, nor for others' short prompts.
        fresh = [r for r in decoding if self._admitted[r][1] == self._plans] if self._turns.now > started else []
        prefilling += [] if self._decode_next else fresh
        if prefilling:
            prefilling.sort(key=self._admitted.__getitem__)
            first = jumpers(prefilling, self._little, bool(decoding) and self._decode_next, self._jumped)
            first += beside(first, fresh, self._little) if self._decode_next else []
            if first and (plan := self._prefill(first)) is not None:
                self._jumped.update(r.tenant for r in first)
                self._decode_next = self._decode_next or len(first) == len(prefilling)
                return plan
        self._jumped.clear()
        for decode in (self._decode_next, not self._decode_next):
            if (plan := self._decode(decoding) if decode else self._prefill(prefilling)) is not None:
                self._decode_next = not decode
                return plan
        return None

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """The step after ``plan``, before it is known what that gives (``ahead.py``); None: take that, and plan then.

        None, too, where somebody waits who could start, if only because a request comes to its full length, where
        nobody knows how many tokens ``plan`` gives, or much may be guessed then, where somebody would have to make way,
        and behind a large step: whoever comes during that would wait for both.
        """
        startable = self.waiting and self.admitting and not self._settled
        if startable or plan.guesses or plan.cost > self._little:
            return None
        ahead = chunks_ahead(plan, len(self.running) - len(self.loading), self._snapshots)
        if not ahead or (self.waiting and len(ahead) + len(self.loading) < len(self.running)):
            return None
        if self.guesses is not None and self.guesses.worth_waiting([c.request for c in ahead.values()]):
            return None
        if not self._one_slot_more([c.request for c in ahead.values() if c.request.slots == c.start]):
            return None
        self._plans += 1
        self._decode_next = False
        self._jumped.clear()
        return decode_step(tuple(ahead.values()), tuple(ahead))

    def _decode(self, decoding: list[Request]) -> Plan | None:
        if not decoding:
            return None
        requests = [r for r in decoding if r.lease is not None] if self.retracted else decoding  # by prefill
        if not self._one_slot_more([r for r in requests if r.slots == r.computed]):
            requests = self._grow(requests, [r.computed + 1 for r in requests])
        if self.guesses is None:
            chunks = [new_chunk((r, r.computed, r.length, True, ())) for r in requests]
        else:
            fit = functools.partial(fitting, self.cache, snapshots=self._snapshots)
            guesses = zip(requests, self.guesses.of(requests), strict=True)
            chunks = [new_chunk((r, r.computed, r.length, True, fit(r, guess))) for r, guess in guesses]
        return decode_step(tuple(chunks)) if chunks else None

    def _prefill(self, prefilling: list[Request]) -> Plan | None:
        counts = self.cutter.counts(prefilling, self._plans)
        chunks = [Chunk(r, r.computed, r.computed + n, n == r.remaining) for r, n in counts.items()]
        self._grow([c.request for c in chunks], [c.stop for c in chunks])
        chunks = [chunk for chunk in chunks if chunk.request.lease is not None]
        for chunk in chunks:
            chunk.request.enter(Stage.PREFILL_FORWARD if chunk.ends else Stage.PREFILL_CHUNKED_FORWARD)
        return Plan(tuple(chunks), decode=False) if chunks else None

    def _one_slot_more(self, requests: Sequence[Request]) -> bool:
        """Let each have one more slot, in one call of the cache; whether all have theirs now."""
        grown = self.cache.grow_many([r.lease for r in requests if r.lease is not None])
        done = all(grown)
        for request in requests if done else itertools.compress(requests, grown):
            request.slots += 1
        return done

    def _grow(self, requests: Sequence[Request], ends: Sequence[int]) -> list[Request]:
        """Slots up to each request's end, retracting the youngest of whoever has most for want of room; those left."""
        lacking = [(r, end) for r, end in zip(requests, ends, strict=True) if r.slots < end]
        for request, end in sorted(lacking, key=lambda each: self._admitted[each[0]]):
            while request.lease is not None and not self.cache.grow(request.lease, end - request.slots):
                if len(self.running) > 1 or self.awaits_bytes:
                    # What copies under way will fill is theirs until they are done: then there is room again.
                    self._retract(max(Held(self.running).largest(self.running), key=self._admitted.__getitem__))
                elif not self.make_way():
                    # Nobody is left to make room: something else holds the pages. Never wait for it in silence.
                    free = f"{self.cache.available_tokens()} tokens available"
                    why = f"the KV cache has no room for request {request.rid} although nothing else runs ({free})"
                    self.finish(request, Finish.abort("no_room", f"{why}: unpin, or raise max_total_tokens"))
                    self.failed.append(request)
            if request.lease is not None:
                request.slots = end
        return [r for r in requests if r.lease is not None]

    # -- admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting requests, in their turns, while a step's worth of prompt, rows and memory are there.

        The first of a tenant that finds no row or no room is waited for: no other of that tenant passes it, and of
        other tenants only the first of those who have nothing running.
        """
        if self._settled or not self.admitting or not self.waiting:
            self._foresight.tell(lambda: self._lines(Held(self.running))[0])
            return
        held = Held(self.running)
        lines, hits = self._lines(held)
        self._foresight.tell(lambda: lines)
        self._settled = len(self.running) >= self._max_running and lines.none_may_claim
        budget = Budget(self._chunk, self.running)
        looks, stuck = _LOOK, False
        while looks and (request := lines.next()) is not None:
            if stuck and held.tenants[request.tenant]:
                return
            hit = hits.get(request) or self._match(request)
            cached = self.loads.reach(hit)
            held_back = request in self.waiting.held or self._sharing.soon(request, cached, self.running)
            if held_back or not budget.allows(request, cached):
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
            hits = {r: self._match(r) for r in self.waiting}

            def place(request: Request) -> Place:
                return (*place_of(request)[:2], *self._rank(request, self.loads.reach(hits[request])))

            ranked = {call: sorted(line, key=place, reverse=True) for call, line in self.waiting.calls.items()}
            return Lines(ranked, place, held, self._turns), hits
        reverse = {call: line[::-1] for call, line in self.waiting.calls.items()}
        return Lines(reverse, place_of, held, self._turns), {}

    def _match(self, request: Request) -> Hit:
        """What the cache has of a waiting request, up to where it may resume: inside of no span."""
        hit = self.cache.match(request.key(request.matchable))
        while request.spans and (start := outside(request.spans, reach := self.loads.reach(hit))) < reach:
            hit = self.cache.match(request.key(start))
        return hit

    def _claim(self, request: Request, hit: Hit, held: Held) -> bool:
        """Start a request of somebody who has nothing running, in place of those who make way for it.

        False, and nothing changed, when that cannot be enough. Once in a request's life: it is started or waits.
        """
        if request.claimed:
            return False
        cached = self.loads.reach(hit)
        lacking = max(self._needs(request, cached).values(), default=0) + cached - self.cache.available_tokens()
        while going := self._claims.who_make_way(request, cached, lacking, self.running, self._admitted, self._plans):
            request.claimed = True
            for gone in going:
                self._retract(gone)
                held.add(gone, -1)
            if self._start(request, hit):
                return True
            lacking = 1  # less was theirs alone than it seemed
        return False

    def _start(self, request: Request, hit: Hit) -> bool:
        """Open a lease if all that is running can still go on; False leaves everything as it was."""
        if len(self.running) >= self._max_running:
            return False
        room = self._needs(request, self.loads.reach(hit)) if self.running else None
        lease = self.cache.open(hit, self.loads.farthest(hit), priority=request.priority, room=room)
        if lease is None:
            return False
        if (start := outside(request.spans, lease.cached)) < lease.cached:  # less than the hit had: there was no room
            self.cache.close(lease)
            return self._start(request, self.cache.match(request.key(start)))
        note_met(request, hit, self.cache)
        request.decisions += self.loads.decided(hit)
        request.lease = lease
        self._namespaces.add(lease.namespace)
        request.computed = request.committed = request.resumable = request.slots = lease.cached
        request.commit_at, request.branch = 0, hit.branch
        self.waiting.remove(request)
        self.running.append(request)
        self._turns.take(request)
        self._admitted[request] = self._turns.now, self._plans
        if lease.ready:
            note_cached(request, hit)
        else:
            self.loading[request] = hit
            request.enter(Stage.LOADING)
        return True

    def _needs(self, request: Request, cached: int) -> dict[str, int]:
        """Tokens that ``request`` and all that run will hold more of each paged kind until all decode, and are to."""
        pending = [request.length - cached + request.kept(self._kept), *(r.ahead(self._kept) for r in self.running)]
        return room_for(self.cache.kinds, pending, self._chunk, self.cache.page_size)

    # -- after the step -------------------------------------------------------------------------------------------

    def advance(self, plan: Plan, tokens: Sequence[Sequence[int]], follow: Follow | None = None) -> list[Request]:
        """Take what ``plan`` computed; ``tokens[i]`` are new of chunk i: one, and those of its guess that were right.

        ``follow`` is asked after each token. Those after a request's last are dropped, wherever the list is cut.
        Requests that ended since ``plan`` was made are passed over. Returns those that got a token or ended, in the
        order of the chunks.
        """
        moved: list[Request] = []
        waits = plan.decode and self._snapshots is None  # to commit: the first chunks of a request are shared at once
        for i, (request, _, stop, ends, guess) in enumerate(plan.chunks):
            if request.finish is not None:
                continue
            request.computed = stop
            if ends:
                moved.append(request)
                if self.guesses is not None and plan.decode:
                    self.guesses.verified(request, len(guess), len(tokens[i]) - 1)
                if guess or stop == request.prompt_length:
                    request.take(tokens[i], None if follow is None else functools.partial(follow, i))
                    if guess:
                        give_back(self.cache, request)
                else:  # one more of its answer, which it is nearly always
                    request.append(tokens[i][0])
                    if follow is not None and (found := follow(i, 0)) is not None:
                        request.finish = request.finish or found
            if request.finish is not None and request.gives:
                moved.pop()
                self._give(request)
            elif request.finish is not None:
                self._end(request)
            elif not waits or request.computed >= request.commit_at:
                self._commit(request, everything=not plan.decode, decode=plan.decode)
        return moved
