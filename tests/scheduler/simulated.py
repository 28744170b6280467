"""A model that needs no arithmetic: a slot holds the hash of the prefix that it was computed from.

A step checks that every position before a chunk finds, through the page table, exactly the hash of its own prefix, then
writes the chunk's. Reading a page that was freed, shared wrongly or written by somebody else cannot go unnoticed. The
next token is a function of the prefix, so what a request must produce is known without any cache.

With ``host`` what is cached is written down to a second tier as well, and comes back from there; a test lets the copies
happen. With ``storage`` what the host has goes on to a store, which is asked for the prompts of new requests under the
rules ``prefetch``; the time is the number of steps. With ``per_step`` a step gives up to so many tokens at once: it
verifies guesses, of which some are right (``guesses.py``).

With ``overlap`` the next step is computed, where the scheduler plans it ahead, before what the one before it gave is
taken.

With ``states`` the model also has recurrent layers: a slot of state holds all that went into it, and a step must find
what comes before its chunk. What a step leaves after guessed tokens lies apart until it is known which are right.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from copies import Copies, host_capacity
from guesses import Guessing
from rootcellar.cache import Kind, RadixCache, Reports, Tier, digests, full, recurrent
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import (
    Chunk,
    Finish,
    Loads,
    Plan,
    Prefetcher,
    PrefetchRules,
    Rates,
    Request,
    Scheduler,
    Snapshots,
    keep,
)

VOCAB = 50
EOS = 7


def extend_hashes(tokens, start_hash=0):
    """The hash of every prefix of ``tokens`` that ends at each of them."""
    out = []
    for token in tokens:
        start_hash = zlib.crc32(int(token).to_bytes(4, "little"), start_hash)
        out.append(start_hash)
    return out


def next_token(prefix_hash):
    return prefix_hash % VOCAB


def expected_answer(prompt, most):
    """What the request must produce: tokens until EOS or ``most`` of them."""
    ids, answer = list(prompt), []
    while len(answer) < most:
        token = next_token(extend_hashes(ids)[-1])
        answer.append(token)
        ids.append(token)
        if token == EOS:
            break
    return answer


@dataclass
class World:
    """A scheduler over a cache of ``tokens`` tokens and a pool of hashes."""

    tokens: int = 64
    page_size: int = 4
    chunk: int = 8
    running: int = 4
    policy: str = "lpm"
    reuse: bool = True
    window: Kind | None = None
    """A window or chunk beside the full layers, with room for ``window_tokens``."""
    window_tokens: int = 0
    core: Callable[..., Any] = RadixCache
    eviction: str = "lru"
    states: int = 0
    interval: int = 16
    least: int = 4
    host: int = 0
    storage: int = 0
    prefetch: PrefetchRules | None = None
    rates: Rates | None = None
    reserved: int = 0
    per_step: int = 1
    unguessed: int = 0
    """Requests with which nothing is guessed."""
    overlap: bool = False
    under_way: tuple[Plan, list[list[int]]] | None = None
    """The step that was computed ahead, and what it gives."""
    overlapped: int = 0
    """Steps that were."""
    requests: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)

    def __post_init__(self):
        total = self.tokens // self.page_size * self.page_size
        kinds, capacity = [full("full", (0,))], {("full", Tier.DEVICE): total}
        if self.window is not None:
            kinds.append(self.window)
            capacity[self.window.name, Tier.DEVICE] = self.window_tokens
        if self.states:
            kinds.append(recurrent("state", (1,)))
            capacity["state", Tier.DEVICE] = self.states
        if self.host:
            capacity |= host_capacity(kinds, self.host)
        if self.storage:
            capacity |= host_capacity(kinds, self.storage, Tier.STORAGE)
        self.cache = self.core(
            kinds,
            page_size=self.page_size,
            capacity=capacity,
            max_leases=self.running,
            max_length=total,
            reuse=self.reuse,
            policy=self.eviction,
        )
        self.paged = [kind for kind in kinds if kind.rule != "recurrent"]
        self.pools = {
            kind.name: np.zeros((capacity[kind.name, Tier.DEVICE] // self.page_size + 1, self.page_size), np.int64)
            for kind in self.paged
        }
        self.state_pool = [None] * (self.states + 1)
        host = np.zeros((self.host // self.page_size + 1, self.page_size), np.int64)
        self.host_pools = {kind.name: host.copy() for kind in self.paged}
        self.copies = Copies(lambda kind, tier: (self.pools if tier is Tier.DEVICE else self.host_pools)[kind])
        self.scheduler = Scheduler(
            self.cache,
            chunked_prefill_size=self.chunk,
            max_running_requests=self.running,
            schedule_policy=self.policy,
            reuse=self.reuse,
            snapshots=Snapshots(self.page_size, self.interval, self.least) if self.states else None,
            guesses=Guessing(self.per_step - 1, VOCAB, self.unguessed) if self.per_step > 1 else None,
            reserved=self.reserved,
            loads=Loads(kinds, self.page_size, {kind.name: self.page_size * 8 for kind in kinds}),
        )
        self.scheduler.loads.learn(self.rates or Rates(), 0)
        self.prefetcher = Prefetcher(self.scheduler, lambda key: digests(key, self.page_size))
        self.now = 0
        if self.storage:
            self.prefetcher.open(self.prefetch or PrefetchRules("wait_complete", 1, lambda tokens: 0.0))

    def add(self, prompt, most, **options):
        request = Request.new(
            f"r{len(self.requests)}",
            np.asarray(prompt),
            SamplingParams(max_new_tokens=most),
            stop_ids=frozenset([EOS]),
            **options,
        )
        self.requests.append(request)
        self.scheduler.add(request)
        self.prefetcher.arrived(request, self.now)
        return request

    def abort(self, request):
        self.scheduler.finish(request, Finish.abort("asked", "a test"))
        self.prefetcher.ended(request)

    def step(self) -> Plan | None:
        """One turn, as the engine has it; the step whose tokens were taken."""
        self.now += 1
        self.prefetcher.expire(self.now)
        self.learn(self.copies.reports())
        if self.under_way is None and (plan := self.scheduler.plan()) is not None:
            assert all(c.start == c.request.computed < c.stop <= c.request.length for c in plan.chunks)
            self.under_way = plan, self.compute(plan, [])
        assert not self.scheduler.failed
        self.dispatch()
        if self.under_way is None:
            return None
        (plan, tokens), self.under_way = self.under_way, None
        if self.overlap and (ahead := self.scheduler.plan_ahead(plan)) is not None:
            assert ahead.decode
            self.overlapped += 1
            self.under_way = ahead, self.compute(ahead, tokens)
        slots = self.written(plan)
        moved = self.scheduler.advance(plan, tokens)
        self.settle(plan, slots)
        self.finished += [r for r in moved if r.finish is not None]
        return plan

    def learn(self, reports: Reports) -> None:
        """Take in what the mover saw, and what the store said."""
        self.scheduler.learn(reports.events)
        self.prefetcher.learned(reports)

    def dispatch(self) -> bool:
        """Hand over copies and questions; whether there were any."""
        moves, questions = self.cache.moves(), self.prefetcher.questions()
        self.copies.dispatch(moves)
        for serial, question in questions:
            self.copies.ask(serial, question)
        return bool(moves or questions)

    def compute(self, plan: Plan, before: list[list[int]]) -> list[list[int]]:
        """What the device does; ``before``: what the step gave that ``plan.sources`` refer to."""
        self.dispatch()
        assert all(request.lease.ready for request in plan.requests)
        assert sum(c.stop - c.start for c in plan.chunks) <= (self.running if plan.decode else self.chunk)
        assert len({c.request for c in plan.chunks}) == len(plan.chunks) <= self.running
        ids = [c.request.ids[: c.stop].tolist() for c in plan.chunks]
        for known, source in zip(ids, plan.sources, strict=bool(plan.sources)):
            known[-1] = before[source][0]
        tokens = []
        for chunk, known in zip(plan.chunks, ids, strict=True):
            hashes = extend_hashes(known)
            for kind in self.paged:
                self.step_pages(kind, chunk, hashes)
            tokens.append(self.choose(chunk, hashes))
        if self.states:
            self.step_states(plan, ids)
        return tokens

    def choose(self, chunk: Chunk, hashes: list[int]) -> list[int]:
        """The token after a chunk, and those of its guess that are right; keys and values of all are written."""
        chosen = [next_token(hashes[-1])]
        for j, token in enumerate(chunk.guess):
            start = chunk.stop + j
            hashes = hashes + extend_hashes([token], hashes[-1])
            for kind in self.paged:
                self.step_pages(kind, Chunk(chunk.request, start, start + 1, True), hashes)
            chosen.append(next_token(hashes[-1]))
        return keep(chunk.guess, chosen)

    def step_pages(self, kind: Kind, chunk: Chunk, hashes: list[int]) -> None:
        """All that the chunk's first token sees is there, and the chunk's own slots are written."""
        row, pool = self.cache.tables[kind.name][chunk.request.lease.row], self.pools[kind.name]
        for position in range(kind.start(chunk.start), chunk.stop):
            page, at = row[position // self.page_size], position % self.page_size
            assert page > 0
            if position < chunk.start:
                assert pool[page, at] == hashes[position]
            else:
                pool[page, at] = hashes[position]

    def step_states(self, plan: Plan, ids: list[list[int]]) -> None:
        """Every row finds the state of what comes before its chunk, and no two share the one they write."""
        slots = [self.cache.tables["state"][chunk.request.lease.row].tolist() for chunk in plan.chunks]
        writes = [write for _, write in slots]
        assert len(set(writes)) == len(writes)
        assert 0 not in writes
        for chunk, known, (read, write) in zip(plan.chunks, ids, slots, strict=True):
            assert read == write or read not in writes
            before, upto = tuple(known[: chunk.start]), tuple(known)
            assert (self.state_pool[read] if read else ()) == before
            self.state_pool[write] = upto

    def written(self, plan: Plan) -> list[int]:
        """The slots of state that the plan's chunks write; 0 for those whose request ended since."""
        leases = (chunk.request.lease for chunk in plan.chunks)
        return [
            0 if not self.states or lease is None else int(self.cache.tables["state"][lease.row, 1]) for lease in leases
        ]

    def settle(self, plan: Plan, slots: list[int]) -> None:
        """The states of requests of whose guess tokens were right become those after these."""
        for chunk, slot in zip(plan.chunks, slots, strict=True):
            request = chunk.request
            if slot and chunk.guess and (right := request.length - 1 - chunk.stop) > 0:
                assert right <= len(chunk.guess)
                self.state_pool[slot] = tuple(request.ids[: chunk.stop + right].tolist())

    def run(self, limit=10_000):
        for _ in range(limit):
            if self.scheduler.idle and self.under_way is None:
                return
            if self.step() is None:
                came = self.copies.finish(dst=Tier.DEVICE) or (
                    self.scheduler.waiting.held and (self.copies.answer() or self.copies.finish())
                )
                assert came or self.prefetcher.next_end, "nothing can be computed although something waits"
            self.cache.check()
        raise AssertionError("the scheduler does not come to an end")

    def land(self):
        """All copies come to their ends, and those that follow from them."""
        self.learn(self.copies.drain())
        while self.dispatch():
            self.learn(self.copies.drain())

    def verify(self):
        """All requests ended as they must, and the cache owns everything again."""
        for request in self.requests:
            if request.finish.type == "abort":
                continue
            answer = request.output.tolist()
            assert answer == expected_answer(request.ids[: request.prompt_length], request.sampling.max_new_tokens)
        self.land()
        assert not self.prefetcher.waiting
        assert not self.scheduler.waiting.held
        self.cache.check()
        shelves = self.cache.stats().shelves
        for shelf in shelves.values():
            assert shelf.free + shelf.cached == shelf.size
            assert shelf.pinned == shelf.leased == 0
        self.cache.flush()
        for name, shelf in self.cache.stats().shelves.items():
            assert shelf.free == shelves[name].size
