"""Requests through a cache without a model: what is noted of each, as the engine notes it, and what is concluded."""

from __future__ import annotations

import numpy as np

from rootcellar.cache import Done, Failed, Key, RadixCache, Tier
from rootcellar.misses import Earlier, Facts, Past, PrefillCost, judge

RATE = 1000.0
"""Earlier tokens a second."""


class Desk:
    """One cache and the prompts that it was asked for. ``capacity``: tokens (states, of a recurrent kind) by tier."""

    def __init__(self, kinds, page_size, **capacity):
        sizes = {}
        for tier, tokens in capacity.items():
            for kind in kinds:
                sizes[kind.name, Tier[tier.upper()]] = 16 if kind.rule == "recurrent" else tokens
        self.page_size = page_size
        self.cache = RadixCache(
            kinds, page_size=page_size, capacity=sizes, max_leases=4, max_length=4096, write_policy="write_through"
        )
        self.past = Past()
        self.openers = {}
        self.flushes = self.served = 0

    def settle(self, fail=False):
        """Let copies be made, or fail."""
        while moves := self.cache.moves():
            for move in moves:
                up = move.dst < move.src
                self.cache.learn(Failed(move.id) if fail and up else Done(move.id))

    def flush(self):
        self.cache.flush()
        self.flushes += 1

    def evict(self, tier=Tier.DEVICE, only=None):
        """Make room of all that a tier holds of each kind, or of one."""
        for (name, at), shelf in self.cache.stats().shelves.items():
            if at is tier and only in (None, name):
                self.cache.make_room(name, shelf.size, tier)

    def serve(self, tokens, *, namespace="w/", tenant="", load=Tier.STORAGE, fail=False, logprobs_from=None):
        """Serve a prompt, and judge it."""
        self.served += 1
        rid = f"r{self.served}"
        key = Key(np.asarray(tokens, np.int64), namespace)
        wanted = len(key) - 1 if logprobs_from is None else logprobs_from
        lost = 0
        while True:
            hit = self.cache.match(key[:wanted])
            gone = self.cache.last_eviction(key[:wanted])
            lease = self.cache.open(hit, load)
            assert lease is not None
            self.settle(fail)
            if not lease.lost:
                break
            lost = hit.reach(Tier.STORAGE)
            self.cache.close(lease)
            load = Tier.DEVICE
        assert lease.ready
        self.openers[self.cache.tick] = rid
        facts = Facts(
            rid=rid,
            tenant=tenant,
            at=float(self.served),
            key=key,
            cached=lease.cached,
            wanted=wanted,
            page_size=self.page_size,
            reaches=tuple(hit.reach(tier) for tier in Tier),
            branch=hit.branch,
            evicted=gone,
            evicted_for="" if gone is None else self.openers.get(gone.tick, ""),
            lost=lost,
            flushes=self.flushes,
            cost=PrefillCost(token=1 / RATE),
        )
        miss = judge(facts, self.past)
        self.past.add(tenant, Earlier(rid, key.tokens, namespace, self.flushes))
        whole = len(key) - len(key) % self.page_size
        for end in (whole, len(key)):
            if end > lease.length:
                assert self.cache.grow(lease, end - lease.length)
                self.cache.commit(lease, key[:end])
        self.cache.close(lease)
        self.settle()
        return miss
