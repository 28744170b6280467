"""A trace through the real cache, without the bytes; and through the offline optimum."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from rootcellar.cache import Done, Hit, Key, Lease, RadixCache, Tier, full
from rootcellar.sim.trace import BLOCK, TraceRequest

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay came to, in tokens. ``refused`` requests could not fit the cache even alone: misses, uncached."""

    policy: str
    capacity_tokens: int
    page_size: int
    input_tokens: int
    hit_tokens: int
    evicted_tokens: int
    refused: int = 0
    by_tier: Mapping[Tier, int] = field(default_factory=dict)
    """Of the hit tokens those that each tier gave, where there are several: what is on a nearer one counts there."""

    @property
    def hit_rate(self) -> float:
        """Hit tokens over input tokens, 0 to 1."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


def replay(
    requests: Sequence[TraceRequest],
    *,
    capacity: int,
    page_size: int = 64,
    policy: str = "lru",
    concurrency: int = 1,
    output_tokens: int | None = 0,
    block: int = BLOCK,
    farther: Mapping[Tier, int] | None = None,
    queued: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """Send requests through a :class:`RadixCache` of ``capacity`` tokens, in order.

    ``farther``: tokens of HOST, and of STORAGE behind it. Copies then take no time: what a farther tier has is loaded.

    Up to ``concurrency`` requests hold their pages at a time; the oldest finishes when another must start. Each
    computes its prompt and then ``output_tokens`` tokens that nobody asks for again (None: as many as the trace says);
    an answer whose ids the trace has is cached instead, and may be asked for.

    ``queued``: of the next so many requests those that a server could have in its queue are known (``foresee``): not
    those that go on from a prompt which waits or runs (:func:`_awaited`), as nobody can send a turn before the answer.
    ``progress`` is called with the number of requests done.
    """
    lengths = [_length(r, output_tokens) for r in requests]
    cache = RadixCache(
        [full("full")],
        page_size=page_size,
        capacity={("full", tier): size for tier, size in {Tier.DEVICE: capacity, **(farther or {})}.items()},
        max_leases=concurrency,
        max_length=max(lengths, default=1),
        policy=policy,
    )
    running: deque[Lease] = deque()
    awaited = _awaited(requests, block) if queued else []
    keys = deque(request.key(block) for request in requests[:queued])
    input_tokens = hit_tokens = refused = fresh = 0
    by_tier = dict.fromkeys((Tier.DEVICE, *farther) if farther else (), 0)
    for done, (request, length) in enumerate(zip(requests, lengths, strict=True), start=1):
        while len(running) >= concurrency:
            cache.close(running.popleft())
            _copy(cache)
        keys.extend(other.key(block) for other in requests[done + queued - 1 : done + queued])
        key = keys.popleft()
        if queued:
            ended = done - 1 - len(running)
            cache.foresee([other for other, before in zip(keys, awaited[done:], strict=False) if before < ended])
        hit = cache.match(key)
        input_tokens += len(key)
        lease = _admit(cache, running, hit.key, length, max(farther or (), default=Tier.DEVICE))
        if lease is None:
            refused += 1
            continue
        hit_tokens += lease.cached
        _count(by_tier, hit, lease.cached)
        if request.output_ids:
            key = request.whole(block)
        elif length > len(key):
            answer = np.arange(fresh - 1, fresh - 1 - (length - len(key)), -1)  # ids below 0 are in no prompt
            fresh -= length - len(key)
            key = Key(np.concatenate([key.tokens, answer]))
        cache.commit(lease, key)
        running.append(lease)
        if progress is not None:
            progress(done)
    for lease in running:
        cache.close(lease)
    evicted = cache.stats().shelves["full", Tier.DEVICE].evicted
    return Outcome(policy, capacity, page_size, input_tokens, hit_tokens, evicted, refused, by_tier)


def _awaited(requests: Sequence[TraceRequest], block: int) -> list[int]:
    """For each request the newest whose prompt it goes on from, by its place in the trace; -1: none.

    It does where it has all whole blocks of a shorter prompt, of which the last came with that, or with one that had no
    others: what many prompts begin with came with none of them.
    """
    newest: dict[int, int] = {}  # the last whole block of a prompt -> the newest request that ends so
    seen: set[int] = set()
    found = []
    for i, request in enumerate(requests):
        before = [newest[ident] for ident in request.hash_ids if ident in newest]
        found.append(max((n for n in before if requests[n].input_length < request.input_length), default=-1))
        if whole := request.input_length // block:
            last = request.hash_ids[whole - 1]
            if last not in seen or (whole > 1 and last in newest):
                newest[last] = i
        seen.update(request.hash_ids)
    return found


def _length(request: TraceRequest, output_tokens: int | None) -> int:
    """Tokens that a request holds in the end."""
    if request.output_ids:
        return request.input_length + max(0, request.output_length - 1)
    return request.input_length + (request.output_length if output_tokens is None else output_tokens)


def _copy(cache: RadixCache) -> None:
    """All that the cache would like to see copied is."""
    while moves := cache.moves():
        for move in moves:
            cache.learn(Done(move.id))


def _count(by_tier: dict[Tier, int], hit: Hit, cached: int) -> None:
    """Add what each tier gave of the ``cached`` tokens of a hit, seen before anything was loaded."""
    before = 0
    for tier in by_tier:
        reach = min(hit.reach(tier), cached)
        by_tier[tier] += reach - before
        before = reach


def _admit(cache: RadixCache, running: deque[Lease], key: Key, length: int, tier: Tier) -> Lease | None:
    """Open and grow a request, letting older ones finish as long as it lacks room. None when it does not fit alone."""
    while True:
        lease = cache.open(cache.match(key), tier)
        if lease is not None:
            _copy(cache)
            if cache.grow(lease, length - lease.length):
                return lease
            cache.close(lease)
        if not running:
            return None
        cache.close(running.popleft())


def optimal(requests: Sequence[TraceRequest], *, capacity: int, block: int = BLOCK) -> Outcome:
    """The offline optimum on the prefix tree: evict the block whose next use is farthest (Belady 1966).

    A block's prefix is used whenever the block is, so its next use is never later: evicting by next use, deepest
    first among equals, takes leaves only. Blocks are the trace's, and those of answers where they are known; a block
    that is never used again is not kept.
    """
    following = _next_uses(requests)
    room = capacity // block
    cached: dict[int, int] = {}  # block -> its next use
    heap: list[tuple[int, int, int]] = []
    input_tokens = hit_tokens = evicted = at = 0
    for request in requests:
        matched = 0
        ids = request.hash_ids
        while matched < len(ids) and ids[matched] in cached:
            matched += 1
        hit_tokens += min(matched * block, request.input_length)
        input_tokens += request.input_length
        for depth, ident in [*enumerate(ids), *enumerate(request.output_ids, request.input_length // block)]:
            cached[ident] = following[at]
            heappush(heap, (-following[at], -depth, ident))
            at += 1
        while len(cached) > room:
            farthest, _, ident = heappop(heap)
            if cached.get(ident) == -farthest:
                del cached[ident]
                evicted += block
    return Outcome("optimal", capacity, block, input_tokens, hit_tokens, evicted)


def _next_uses(requests: Sequence[TraceRequest]) -> list[int]:
    """For each block of prompts and answers, in order, the index of the next prompt with it (their number: none)."""
    seen: dict[int, int] = {}
    following: list[int] = []
    for i in range(len(requests) - 1, -1, -1):
        blocks = requests[i].hash_ids + requests[i].output_ids
        following += [seen.get(ident, len(requests)) for ident in reversed(blocks)]
        seen.update(dict.fromkeys(requests[i].hash_ids, i))
    return following[::-1]
