"""The cache as a scheduler sees it, in Python: ``RadixCache`` where there is no native core, and its specification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import control, words
from rootcellar.cache.check import check
from rootcellar.cache.digest import chain
from rootcellar.cache.explain import Explanation, explain, pretty_print
from rootcellar.cache.flights import Traffic, learn, spill
from rootcellar.cache.glimpse import State, memory_bytes, state
from rootcellar.cache.journal import AllBlocksCleared, Eviction, Journal, KVEvent
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.match import Hit, find, fresh, slots, touch
from rootcellar.cache.moves import Done, Event, Failed, Found, Manifest, Move, Question
from rootcellar.cache.settings import Settings
from rootcellar.cache.sight import TreeView, trail, tree_view
from rootcellar.cache.slots import not_free
from rootcellar.cache.stats import CacheStats, shelf_stats
from rootcellar.cache.tree import Tree
from rootcellar.cache.verbs import Desk, close, commit, fill_rows, grow, grow_many, must_be_open, open_lease


class PyRadixCache:
    """A prefix cache over the kinds and tiers it is given. Pure logic: it decides and never copies, waits or sleeps.

    ``RadixCache(kinds, capacity=..., ...)``: the arguments are those of ``Settings``.
    """

    def __init__(self, kinds: Sequence[Kind], **others: Any) -> None:
        given = Settings(kinds=tuple(kinds), **others)
        self.kinds, self.page_size = given.kinds, given.page_size
        self._tree = Tree(given, given.sizes)
        self.tables = ReqToTokenPool([kind.name for kind in given.kinds], given.widths, given.max_leases)
        self._desk = Desk(self._tree, self.tables, Traffic(), given)
        self._traffic = self._desk.traffic
        if given.write_back:
            self._tree.spill = lambda node, shelf: spill(self._tree, self._traffic, node, shelf)
        self._tree.journal = Journal(self._tree.naming, self.kinds) if given.events else None
        self._requests = 0
        self._input_tokens = 0
        self._hit_tokens = dict.fromkeys(self._tree.tiers, 0)

    # ---- the verbs ----------------------------------------------------------------------------------------------

    def match(self, key: Key) -> Hit:
        """How far ``key`` is cached, per tier. Changes nothing but recency. O(tokens matched + nodes on the path)."""
        hit = find(self._tree, key)
        touch(self._tree, hit)
        return hit

    def open(
        self, hit: Hit, tier: Tier = Tier.DEVICE, *, priority: int = 0, room: Mapping[str, int] | None = None
    ) -> Lease | None:
        """Pin what the rule needs in order to resume at ``hit.reach(tier)``. None when there is no room for it.

        ``room`` asks for more before anything is opened: None too, and nothing counted or changed, unless so many
        tokens of each paged kind, by its name and rounded up to whole pages, could then be grown, all together.

        A stale hit (the tree changed since ``match``) is looked up again; with ``room``, which was made for the hit as
        it was, the answer is None when it has become shorter. Raises ``RequestTooLarge`` when the key is longer than
        ``max_length``.
        """
        if self._desk.expiries:
            control.expire(self._desk)
        seen, hit = hit, fresh(self._tree, hit)
        if room is not None and self._desk.boundary(hit, tier) < self._desk.boundary(seen, tier):
            return None
        lease = open_lease(self._desk, hit, tier, priority, room)
        if lease is not None:
            self._requests += 1
            self._input_tokens += len(hit.key)
            counted = 0
            for nearer in self._tree.tiers:
                self._hit_tokens[nearer] += max(0, min(hit.reach(nearer), lease.cached) - counted)
                counted = max(counted, min(hit.reach(nearer), lease.cached))
        return lease

    def grow(self, lease: Lease, tokens: int) -> bool:
        """Slots for ``tokens`` more tokens, for the next step. May evict. False: nothing changed, wait or retract.

        One call is one step: a recurrent kind's state to read becomes, from the second call on, the one written.
        Raises ``RequestTooLarge`` when the row is full (``max_length``).
        """
        return grow(self._desk, lease, tokens)

    def grow_many(self, leases: Sequence[Lease], tokens: int | Sequence[int] = 1) -> list[bool]:
        """:meth:`grow` for each lease of a batch, in order; False for those that found no room.

        ``tokens`` is the same for all, or one number for each.
        """
        return grow_many(self._desk, leases, tokens)

    def commit(self, lease: Lease, key: Key, *, snapshot: bool = True) -> None:
        """Make the whole pages of ``key``, the request's first ``len(key)`` tokens, all computed, shareable.

        Where the tree has a page already the lease's duplicate is freed and its row points to the tree's page. Pages
        before the rule's start at ``len(key)`` leave the row. When ``key`` is all the lease has and ends on a page,
        ``snapshot`` hands the recurrent state to the tree (skipped when no state is free).
        Raises ``RequestError`` for a key longer than the lease or of another namespace.
        """
        commit(self._desk, lease, key, snapshot)

    def commit_many(self, leases: Sequence[Lease], keys: Sequence[Key], *, snapshot: bool = True) -> None:
        """:meth:`commit` for each lease of a batch, in order."""
        must_be_open(self._desk, *leases)
        if len(keys) != len(leases):
            raise words.uneven("keys")
        for lease, key in zip(leases, keys, strict=True):
            commit(self._desk, lease, key, snapshot)

    def close(self, lease: Lease, keep: bool = True) -> None:
        """End a lease: finished, aborted and retracted alike. What was not committed is freed.

        ``keep=False`` also throws away what this request added to the tree and nobody else uses.
        """
        close(self._desk, lease, keep)

    def close_many(self, leases: Sequence[Lease], keep: bool = True) -> None:
        """:meth:`close` for each lease of a batch, in order."""
        must_be_open(self._desk, *leases)
        for lease in leases:
            close(self._desk, lease, keep)

    def slots(self, hit: Hit, kind: str) -> NDArray[np.int32]:
        """Where the device holds the ``hit.length`` tokens of a hit, for a paged kind: int32 ``[hit.length]``.

        A token's slot is ``page * page_size + position % page_size``; slots of page 0 stand for what the kind does not
        hold (any more). A stale hit is looked up again. Nothing is pinned: ask a lease's row for what must stay.
        Raises ``KeyError`` for a kind that is not there or not paged.
        """
        return slots(self._tree, hit, kind)

    def make_room(self, kind: str, tokens: int, tier: Tier = Tier.DEVICE) -> bool:
        """Evict until ``tokens`` of a kind are free on a tier. False, and nothing changed, when that cannot be.

        ``grow`` and ``open`` do this by themselves. Raises ``KeyError`` for a kind that is not on that tier.
        """
        return control.make_room(self._desk, kind, tokens, tier)

    def flush(self) -> None:
        """Forget everything. Raises ``CacheBusy`` while leases or copies are live."""
        leases, copies = self._desk.busy()
        if leases or copies:
            raise words.busy("the cache cannot be flushed", leases, copies)
        journal, self._tree.journal = self._tree.journal, None
        for namespace in list(self._tree.roots):
            control.drop_namespace(self._desk, namespace)
        self._tree.detached.clear()
        self._tree.journal = journal
        if journal is not None:
            journal.events.append(AllBlocksCleared())

    # ---- tiers --------------------------------------------------------------------------------------------------

    def moves(self) -> list[Move]:
        """The copies planned since the last call, in the order in which to dispatch them (see ``moves.py``)."""
        outbox, self._traffic.outbox = self._traffic.outbox, []
        return outbox

    def learn(self, event: Event) -> None:
        """What the movers saw: ``Done``, ``Failed``, ``Found`` or ``Lost``. A move that is not known is ignored."""
        if isinstance(event, Found) and not self._desk.given.reuse:
            return
        if isinstance(event, Done | Failed) and control.settle(self._desk, event.move):
            return
        for lease in learn(self._tree, self._traffic, event):
            if self._desk.leases.get(lease.row) is lease:
                fill_rows(self._desk, lease)

    def ask(self, key: Key, tier: Tier = Tier.STORAGE) -> Question | None:
        """What to ask a store or a peer of ``key``, whose answer is then learned. None when it could add nothing.

        That is so where ``tier`` or nearer ones have all whole pages, or a kind is never kept there. Changes nothing.
        """
        found = control.ask(self._desk, key, tier)
        return None if found is None else control.question(self.kinds, self._tree.naming, chain, key, tier, *found)

    def send(self, key: Key, start: int = 0) -> Manifest | None:
        """Offer a peer that can resume at ``start`` (tokens) what it needs in order to resume at the end of ``key``.

        As far as the device holds it, in whole pages; None when that is not beyond ``start``. What is offered stays
        on the device until the manifest's ``id`` is reported, ``Done`` or ``Failed``. Each call is an offer of its own:
        several peers may be sent the same, and one peer, chunk by chunk, what was computed meanwhile.
        """
        return control.offer(self._desk, key, start)

    def save(self) -> int:
        """Plan to copy all that only the device holds to HOST; returns the number of moves (before a drop)."""
        return control.save(self._desk)

    def forget_tier(self, tier: Tier) -> None:
        """Forget what a tier holds. Raises ``CacheBusy`` while leases or copies are live."""
        control.forget_tier(self._desk, tier)

    def prefetch(self, hit: Hit, tier: Tier = Tier.STORAGE) -> control.Prefetch | None:
        """Plan to bring what ``tier`` adds to a hit to HOST; None when it is not worth it (``min_load``)."""
        return control.prefetch(self._desk, hit, tier)

    def pending(self, prefetch: control.Prefetch) -> int:
        """How many moves of a prefetch are not yet reported; see ``prefetch_verdict``."""
        return sum(move in self._traffic.flights for move in prefetch.moves)

    # ---- control ------------------------------------------------------------------------------------------------

    def pin(self, key: Key, ttl: int) -> int:
        """Keep what the device holds of ``key`` for ``ttl`` ticks (a tick is an opened lease). Returns its tokens."""
        return control.pin(self._desk, key, ttl)

    def unpin(self, key: Key) -> int:
        """Undo the pins of prefixes of ``key``; returns how many there were."""
        return control.unpin(self._desk, key)

    def drop_namespace(self, namespace: str) -> int:
        """Forget a namespace (LoRA, tenant, old weights). Returns the tokens that live leases keep till they close."""
        return control.drop_namespace(self._desk, namespace)

    # ---- sight --------------------------------------------------------------------------------------------------

    def available_tokens(self) -> int:
        """Tokens that could be grown now: free plus evictable, the least over the paged kinds. O(kinds).

        Kinds that share an arena take a page each for the same tokens.
        """
        sharers = Counter(shelf.arena for shelf in self._desk.paged)
        return min((arena.room // count for arena, count in sharers.items()), default=0) * self.page_size

    def used_pages(self, kind: str, tier: Tier = Tier.DEVICE) -> NDArray[np.int32]:
        """The pages of a kind on a tier that are not free, ascending: whose bytes somebody may want. O(pages).

        Where kinds share an arena, the pages of all of them: they lie in the same buffers.
        """
        (pool,) = (s.arena.slots for s in self._tree.shelves if s.kind.name == kind and s.tier is tier)
        return not_free(pool.pages, pool.free_list())

    def stats(self) -> CacheStats:
        """Counts per kind and tier and running totals. O(kinds * tiers)."""
        return CacheStats(
            shelves={(s.kind.name, s.tier): shelf_stats(s, self.page_size) for s in self._tree.shelves},
            leases=len(self._desk.leases),
            nodes=self._tree.nodes,
            ticks=self._tree.tick,
            requests=self._requests,
            input_tokens=self._input_tokens,
            hit_tokens=sum(self._hit_tokens.values()),
            hit_tokens_by_tier=dict(self._hit_tokens),
        )

    def take_events(self) -> list[KVEvent]:
        """The KV events since the last call, oldest first; empty unless the cache was made with ``events``."""
        if self._tree.journal is None:
            return []
        events, self._tree.journal.events = self._tree.journal.events, []
        return events

    @property
    def tick(self) -> int:
        """Leases opened so far: the cache's clock, in which ages are counted."""
        return self._tree.tick

    def take_evictions(self) -> list[Eviction]:
        """What was evicted since the last call, oldest first; at most the newest 4,096 entries."""
        return self._tree.evictions.take()

    def tree(self, limit: int = 200) -> TreeView:
        """The ``limit`` most important nodes, for pictures: in use, then most often hit, then most recent."""
        return tree_view(self._tree, limit)

    def trail(self, key: Key) -> tuple[int, ...]:
        """Ids, as in :meth:`tree`, of the nodes that ``key`` goes through. Changes nothing, not even recency."""
        return trail(self._tree, key)

    def explain(self, key: Key, may_name: Callable[[str], bool] = lambda _: True) -> Explanation:
        """Why ``key`` hits as far as it does. Changes nothing, not even recency.

        ``may_name``: whether another namespace may be named as one that has more of the key.
        """
        return explain(self._tree, key, may_name)

    def pretty_print(self, limit: int = 100) -> str:
        """The tree in words, at most ``limit`` nodes."""
        return pretty_print(self._tree, limit)

    def check(self) -> None:
        """Recount every invariant, O(cache). Raises ``CacheBroken`` with the evidence."""
        check(self._desk)

    def memory_bytes(self) -> int:
        """Bytes that the tree, the orders of leaving and the allocators take, page tables not counted. O(cache)."""
        return memory_bytes(self._desk)

    def _inside(self) -> Desk:
        """The cache's insides, to read."""
        return self._desk

    def _state(self) -> State:
        """Everything, as plain values that equal those of the native core in the same state."""
        return state(self._desk, self._requests, self._input_tokens)
