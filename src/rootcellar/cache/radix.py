"""The cache as a scheduler sees it, in Python: ``RadixCache`` where there is no native core, and its specification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import control, words
from rootcellar.cache.api import PrefixCache
from rootcellar.cache.cache import Cache
from rootcellar.cache.check import check
from rootcellar.cache.digest import chain
from rootcellar.cache.explain import Explanation, everybody, explain, pretty_print
from rootcellar.cache.flights import Traffic, learn, spill
from rootcellar.cache.freeze import Frozen, freeze, memory_bytes
from rootcellar.cache.journal import AllBlocksCleared, Eviction, Journal, KVEvent
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.match import Hit, find, fresh, slots, touch
from rootcellar.cache.moves import Done, Event, Failed, Found, Manifest, Move, Question
from rootcellar.cache.settings import Settings
from rootcellar.cache.slots import not_free
from rootcellar.cache.stats import CacheStats, shelf_stats
from rootcellar.cache.tree import Tree
from rootcellar.cache.verbs import close, commit, fill_rows, grow, grow_many, must_be_open, open_lease
from rootcellar.cache.views import TreeView, last_eviction, trail, tree_view


class PyRadixCache(PrefixCache):
    """The cache of ``api.py`` over ``Settings(kinds, ...)``, in Python."""

    def __init__(self, kinds: Sequence[Kind], **others: Any) -> None:
        given = Settings(kinds=tuple(kinds), **others)
        self.kinds, self.page_size = given.kinds, given.page_size
        self._tree = Tree(given, given.sizes)
        self.tables = ReqToTokenPool([kind.name for kind in given.kinds], given.widths, given.max_leases)
        self._cache = Cache(self._tree, self.tables, Traffic(written={*given.written}), given)
        self._traffic = self._cache.traffic
        if given.write_back:
            self._tree.spill = lambda node, shelf: spill(self._tree, self._traffic, node, shelf)
        self._tree.journal = Journal(self._tree.naming, self.kinds) if given.events else None
        self._requests = 0
        self._input_tokens = 0
        self._hit_tokens = dict.fromkeys(self._tree.tiers, 0)

    # ---- the verbs ----------------------------------------------------------------------------------------------

    def match(self, key: Key) -> Hit:
        hit = find(self._tree, key)
        touch(self._tree, hit)
        return hit

    def open(
        self, hit: Hit, tier: Tier = Tier.DEVICE, *, priority: int = 0, room: Mapping[str, int] | None = None
    ) -> Lease | None:
        if self._cache.expiries:
            control.expire(self._cache)
        seen, hit = hit, fresh(self._tree, hit)
        if room is not None and self._cache.boundary(hit, tier) < self._cache.boundary(seen, tier):
            return None
        lease = open_lease(self._cache, hit, tier, priority, room)
        if lease is not None:
            self._requests += 1
            self._input_tokens += len(hit.key)
            counted = 0
            for nearer in self._tree.tiers:
                self._hit_tokens[nearer] += max(0, min(hit.reach(nearer), lease.cached) - counted)
                counted = max(counted, min(hit.reach(nearer), lease.cached))
        return lease

    def grow(self, lease: Lease, tokens: int, *, step: bool = True) -> bool:
        return grow(self._cache, lease, tokens, step)

    def grow_many(self, leases: Sequence[Lease], tokens: int | Sequence[int] = 1) -> list[bool]:
        return grow_many(self._cache, leases, tokens)

    def commit(self, lease: Lease, key: Key, *, snapshot: bool = True) -> None:
        commit(self._cache, lease, key, snapshot)

    def commit_many(self, leases: Sequence[Lease], keys: Sequence[Key], *, snapshot: bool = True) -> None:
        must_be_open(self._cache, *leases)
        if len(keys) != len(leases):
            raise words.uneven("keys")
        for lease, key in zip(leases, keys, strict=True):
            commit(self._cache, lease, key, snapshot)

    def close(self, lease: Lease, keep: bool = True) -> None:
        close(self._cache, lease, keep)

    def close_many(self, leases: Sequence[Lease], keep: bool = True) -> None:
        must_be_open(self._cache, *leases)
        for lease in leases:
            close(self._cache, lease, keep)

    def slots(self, hit: Hit, kind: str) -> NDArray[np.int32]:
        return slots(self._tree, hit, kind)

    def make_room(self, kind: str, tokens: int, tier: Tier = Tier.DEVICE) -> bool:
        return control.make_room(self._cache, kind, tokens, tier)

    def flush(self) -> None:
        leases, copies = self._cache.busy()
        if leases or copies:
            raise words.busy("the cache cannot be flushed", leases, copies)
        journal, self._tree.journal = self._tree.journal, None
        for namespace in list(self._tree.roots):
            control.drop_namespace(self._cache, namespace)
        self._tree.detached.clear()
        self._tree.journal = journal
        if journal is not None:
            journal.events.append(AllBlocksCleared())

    # ---- tiers --------------------------------------------------------------------------------------------------

    def moves(self) -> list[Move]:
        outbox, self._traffic.outbox = self._traffic.outbox, []
        return outbox

    def learn(self, event: Event) -> None:
        if isinstance(event, Found) and not self._cache.given.reuse:
            return
        if isinstance(event, Done | Failed) and control.settle(self._cache, event.move):
            return
        for lease in learn(self._tree, self._traffic, event):
            if self._cache.leases.get(lease.row) is lease:
                fill_rows(self._cache, lease)

    def ask(self, key: Key, tier: Tier = Tier.STORAGE) -> Question | None:
        found = control.ask(self._cache, key, tier)
        return None if found is None else control.question(self.kinds, self._tree.naming, chain, key, tier, *found)

    def send(self, key: Key, start: int = 0) -> Manifest | None:
        return control.offer(self._cache, key, start)

    def save(self, tier: Tier = Tier.HOST) -> int:
        return control.save(self._cache, tier)

    def write_down(self, key: Key) -> int:
        return control.write_down(self._cache, key)

    def write_to(self, tier: Tier, on: bool) -> None:
        control.write_to(self._cache, tier, on)

    def forget_tier(self, tier: Tier) -> None:
        control.forget_tier(self._cache, tier)

    def prefetch(self, hit: Hit, tier: Tier = Tier.STORAGE) -> control.Prefetch | None:
        return control.prefetch(self._cache, hit, tier)

    def pending(self, prefetch: control.Prefetch) -> int:
        return sum(move in self._traffic.flights for move in prefetch.moves)

    # ---- control ------------------------------------------------------------------------------------------------

    def pin(self, key: Key, ttl: int) -> int:
        return control.pin(self._cache, key, ttl)

    def unpin(self, key: Key) -> int:
        return control.unpin(self._cache, key)

    def expect(self, key: Key, when: int) -> int:
        return control.expect(self._cache, key, when)

    def foresee(self, keys: Sequence[Key]) -> int:
        return control.foresee(self._cache, keys)

    def drop_namespace(self, namespace: str) -> int:
        return control.drop_namespace(self._cache, namespace)

    # ---- observability ------------------------------------------------------------------------------------------

    def available_tokens(self) -> int:
        sharers = Counter(shelf.arena for shelf in self._cache.paged)
        return min((arena.room // count for arena, count in sharers.items()), default=0) * self.page_size

    def used_pages(self, kind: str, tier: Tier = Tier.DEVICE) -> NDArray[np.int32]:
        (pool,) = (s.arena.slots for s in self._tree.shelves if s.kind.name == kind and s.tier is tier)
        return not_free(pool.pages, pool.free_list())

    def stats(self) -> CacheStats:
        return CacheStats(
            shelves={(s.kind.name, s.tier): shelf_stats(s, self.page_size) for s in self._tree.shelves},
            leases=len(self._cache.leases),
            nodes=self._tree.nodes,
            ticks=self._tree.tick,
            requests=self._requests,
            input_tokens=self._input_tokens,
            hit_tokens=sum(self._hit_tokens.values()),
            hit_tokens_by_tier=dict(self._hit_tokens),
        )

    def take_events(self) -> list[KVEvent]:
        if self._tree.journal is None:
            return []
        events, self._tree.journal.events = self._tree.journal.events, []
        return events

    @property
    def tick(self) -> int:
        return self._tree.tick

    def take_evictions(self) -> list[Eviction]:
        return self._tree.evictions.take()

    def tree(self, limit: int = 200) -> TreeView:
        return tree_view(self._tree, limit)

    def trail(self, key: Key) -> tuple[int, ...]:
        return trail(self._tree, key)

    def last_eviction(self, key: Key) -> Eviction | None:
        return last_eviction(self._tree, key)

    def explain(self, key: Key, may_name: Callable[[str], bool] = everybody) -> Explanation:
        return explain(self._tree, key, may_name)

    def pretty_print(self, limit: int = 100) -> str:
        return pretty_print(self._tree, limit)

    def check(self) -> None:
        check(self._cache)

    def memory_bytes(self) -> int:
        return memory_bytes(self._cache)

    def _inside(self) -> Cache:
        """The cache's insides, to read."""
        return self._cache

    def _frozen(self) -> Frozen:
        """Everything, as plain values that equal those of the native core in the same state."""
        return freeze(self._cache, self._requests, self._input_tokens)
