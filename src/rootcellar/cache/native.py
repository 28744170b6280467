"""The native core as a ``RadixCache``: the verbs are C++ (``native/``), what is said in words is Python.

The hot verbs are inherited from the C++ object, so a call enters it at once; here is what happens seldom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import _core  # the compiled module alone: the package itself chooses among the cores
from rootcellar.cache.adaptive import EDGES
from rootcellar.cache.api import PrefixCache
from rootcellar.cache.cache import Cache
from rootcellar.cache.check import check
from rootcellar.cache.control import Prefetch, question
from rootcellar.cache.digest import Naming
from rootcellar.cache.explain import Explanation, everybody, explain, pretty_print
from rootcellar.cache.freeze import thaw, thaw_cache
from rootcellar.cache.journal import AllBlocksCleared, Eviction, Evictions, KVEvent, removed, stored
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.lease import ReqToTokenPool
from rootcellar.cache.moves import Done, Event, Failed, Found, Lost, Manifest, Move, Part, Question
from rootcellar.cache.settings import Settings
from rootcellar.cache.slots import not_free
from rootcellar.cache.stats import CacheStats, count_shelf
from rootcellar.cache.tree import Tree
from rootcellar.cache.views import NodeView, TreeView
from rootcellar.cache.words import busy


class NativeRadixCache(_core.Core):
    """The cache of ``api.py`` over ``Settings(kinds, ...)``, in C++: call by call what ``PyRadixCache`` does."""

    # Tokens from which an edge refers to the memory of a key that never changes (see ``Key``) instead of copying it:
    # a copy of fewer is smaller than what it takes to hold a numpy array.
    LEAST_SHARED = 64

    def __init__(self, kinds: Sequence[Kind], **others: Any) -> None:
        given = self._given = Settings(kinds=tuple(kinds), **others)
        # Shelves, arenas and tiers are laid out in one place, by the twin's constructor.
        plan = thaw(given, (), full=False)
        self.kinds, self.page_size = given.kinds, given.page_size
        self.tables = ReqToTokenPool([kind.name for kind in given.kinds], given.widths, given.max_leases)
        self._tiers = plan.tiers
        self._shelves = [(shelf.kind, shelf.tier) for shelf in plan.shelves]
        sizes = {shelf.arena.name: given.sizes[shelf.kind_index, shelf.tier] for shelf in plan.shelves}
        super().__init__(
            given,
            [(shelf.kind_index, int(shelf.tier), plan.arenas.index(shelf.arena)) for shelf in plan.shelves],
            [(arena.name, sizes[arena.name] // arena.slots.page_size) for arena in plan.arenas],
            EDGES,
            self.tables.by_kind,
            self.LEAST_SHARED,
        )

    # ---- tiers and control ------------------------------------------------------------------------------------------

    def moves(self) -> list[Move]:
        return [
            Move(ident, self.kinds[k].name, Tier(src), Tier(dst), src_slots, dst_slots, first, digests)
            for ident, k, src, dst, src_slots, dst_slots, first, digests in self._moves()
        ]

    def learn(self, event: Event) -> None:
        if isinstance(event, Done | Failed) and self._settle(event.move):
            return
        if isinstance(event, Done):
            self._done(event.move)
        elif isinstance(event, Failed):
            self._failed(event.move)
        elif isinstance(event, Found):
            self._found(event.key, event.tier, event.kind, event.start)
        elif isinstance(event, Lost):
            self._lost(event.key, event.tier, event.kind, event.start)

    def forget_tier(self, tier: Tier) -> None:
        leases, copies = self._busy(tier)
        if leases or copies:
            raise busy(f"{tier.name} cannot be emptied", leases, copies)
        self._forget_tier(tier)

    def ask(self, key: Key, tier: Tier = Tier.STORAGE) -> Question | None:
        found = self._ask(key, tier)
        naming = Naming(self.page_size, self._given.fingerprint)
        return None if found is None else question(self.kinds, naming, _core.chain, key, tier, *found)

    def send(self, key: Key, start: int = 0) -> Manifest | None:
        found = self._offer(key, start)
        if found is None:
            return None
        ident, tokens, parts = found
        return Manifest(ident, tokens, tuple(Part(self.kinds[k].name, *part) for k, *part in parts))

    def prefetch(self, hit: _core.Hit, tier: Tier = Tier.STORAGE) -> Prefetch | None:
        found = self._prefetch(hit, tier)
        return None if found is None else Prefetch(frozenset(found[0]), found[1])

    def pending(self, prefetch: Prefetch) -> int:
        return sum(map(self._flies, prefetch.moves))

    def flush(self) -> None:
        leases, copies = self._busy(None)
        if leases or copies:
            raise busy("the cache cannot be flushed", leases, copies)
        self._flush()

    # ---- observability ----------------------------------------------------------------------------------------------

    def used_pages(self, kind: str, tier: Tier = Tier.DEVICE) -> NDArray[np.int32]:
        (shelf,) = (i for i, (its, at) in enumerate(self._shelves) if its.name == kind and at is tier)
        return not_free(self._counts()[0][shelf][0], self._free_pages(shelf))

    def stats(self) -> CacheStats:
        shelves, leases, nodes, ticks, requests, input_tokens, hits = self._counts()
        return CacheStats(
            shelves={
                (kind.name, tier): count_shelf(1 if kind.rule == "recurrent" else self.page_size, *numbers)
                for (kind, tier), numbers in zip(self._shelves, shelves, strict=True)
            },
            leases=leases,
            nodes=nodes,
            ticks=ticks,
            requests=requests,
            input_tokens=input_tokens,
            hit_tokens=sum(hits),
            hit_tokens_by_tier=dict(zip(self._tiers, hits, strict=True)),
        )

    def take_events(self) -> list[KVEvent]:
        events: list[KVEvent] = []
        for what, digests, parent, tokens, medium, namespace in self._take_events():
            if what == 0:
                tier = Tier(medium)
                events.append(stored(self.kinds, digests, parent, tokens, self.page_size, tier, namespace))
            elif what == 1:
                events.append(removed(self.kinds, digests, Tier(medium)))
            else:
                events.append(AllBlocksCleared())
        return events

    def take_evictions(self) -> list[Eviction]:
        return [self._eviction(*numbers) for numbers in self._take_evictions()]

    def _eviction(self, tick: int, k: int, tier: int, *rest: int) -> Eviction:
        return Eviction(tick, self.kinds[k].name, Tier(tier), *rest)

    def tree(self, limit: int = 200) -> TreeView:
        _, _, total, tick, *_ = self._counts()
        return TreeView(tuple(self._view(*record) for record in self._top_nodes(limit)), total, tick)

    def _view(
        self, ident: int, parent: int, namespace: str, start: int, size: int, head: tuple[int, ...],
        held: list[tuple[int, int]], *rest: Any,
    ) -> NodeView:  # fmt: skip
        page = self.page_size
        tokens = {}
        for shelf, pages in held:
            kind, tier = self._shelves[shelf]
            tokens[kind.name, tier] = pages * (1 if kind.rule == "recurrent" else page)
        return NodeView(ident, parent, namespace, start * page, size * page, head, tokens, *rest)

    def last_eviction(self, key: Key) -> Eviction | None:
        found = self._last_eviction(key)
        return None if found is None else self._eviction(*found)

    def explain(self, key: Key, may_name: Callable[[str], bool] = everybody) -> Explanation:
        return explain(self._part(self._nodes_on_the_way(key)), key, may_name)

    def pretty_print(self, limit: int = 100) -> str:
        return pretty_print(self._part(self._nodes(limit + 1)), limit)

    def _part(self, records: list[tuple[Any, ...]]) -> Tree:
        """Some nodes as the twin's, in a tree that knows what it must for its words."""
        tree = thaw(self._given, records, full=False)
        _, _, tree.nodes, tree.tick, *_ = self._counts()
        tree.evictions = _NativeEvictions(self)
        return tree

    def check(self) -> None:
        check(self._inside())

    def _inside(self) -> Cache:
        """The cache's insides, to read: a copy, but for the page tables."""
        return thaw_cache(self._given, self._frozen(), self.tables)


for _name, _verb in vars(PrefixCache).items():
    if _name in vars(NativeRadixCache) and not _name.startswith("_"):
        vars(NativeRadixCache)[_name].__doc__ = _verb.__doc__


class _NativeEvictions(Evictions):
    """The evictions that the native core remembers."""

    def __init__(self, cache: NativeRadixCache) -> None:
        super().__init__()
        self._cache = cache

    def find(self, where: int, what: bytes) -> Eviction | None:
        found = self._cache._find_eviction(where, what)
        return None if found is None else self._cache._eviction(*found)
