"""A recorded log of requests through the real cache, without the bytes: what each of them computed again, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rootcellar.cache import Key, RadixCache, Tier, full
from rootcellar.misses import Earlier, Facts, Miss, Past, PrefillCost, judge


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request; ``at``: when, in seconds. ``key``: its prompt, with the namespace that it was cached in."""

    rid: str
    key: Key
    at: float = 0.0
    tenant: str = ""


def misses(requests: Iterable[LoggedRequest], *, capacity: int, page_size: int, rate: float = 0.0) -> Iterator[Miss]:
    """One miss for each request, in order, as if each came when the one before had ended.

    A prompt longer than the cache's ``capacity`` (tokens) is passed over. ``rate``: prompt tokens that are computed in
    a second; 0: nothing is said of seconds.
    """
    cache = RadixCache(
        [full("full")],
        page_size=page_size,
        capacity={("full", Tier.DEVICE): capacity},
        max_leases=1,
        max_length=capacity,
    )
    past = Past()
    openers: dict[int, tuple[str, float]] = {}  # who came at a tick, and when; not its prompt: a log may be long
    for request in requests:
        key = request.key
        if len(key) > capacity - capacity % page_size:
            continue
        wanted = key[: len(key) - 1]
        hit = cache.match(wanted)
        gone = cache.last_eviction(wanted)
        lease = cache.open(hit)
        assert lease is not None, "nothing else holds memory"
        openers[cache.tick] = request.rid, request.at
        opener = None if gone is None else openers.get(gone.tick)
        facts = Facts(
            rid=request.rid,
            tenant=request.tenant,
            at=request.at,
            key=key,
            cached=lease.cached,
            wanted=len(wanted),
            page_size=page_size,
            reaches=tuple(hit.reach(tier) for tier in Tier),
            branch=hit.branch,
            evicted=gone,
            evicted_at=None if opener is None else opener[1],
            evicted_for="" if opener is None else f"request {opener[0]}",
            cost=PrefillCost(token=1 / rate) if rate else PrefillCost(),
        )
        yield judge(facts, past)
        past.add(request.tenant, Earlier(request.rid, key.tokens, key.namespace, 0))
        cache.grow(lease, len(key) - lease.length)
        cache.commit(lease, key)
        cache.close(lease)
