"""``RadixCache``: the cache as a scheduler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import control
from rootcellar.cache.check import check
from rootcellar.cache.explain import Explanation, explain, pretty_print
from rootcellar.cache.flights import Traffic, learn, spill
from rootcellar.cache.journal import AllBlocksCleared, Journal, KVEvent
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.match import Hit, find, touch
from rootcellar.cache.moves import Event, Found, Move
from rootcellar.cache.stats import CacheStats, shelf_stats
from rootcellar.cache.tree import Tree
from rootcellar.cache.verbs import Desk, close, commit, fill_rows, grow, grow_many, open_lease
from rootcellar.errors import CacheBusy, ConfigError

Capacity = Mapping[tuple[str, Tier], int]
WRITE_POLICIES = ("write_through", "write_through_selective", "write_back")


class RadixCache:
    """A prefix cache over the kinds and tiers it is given. Pure logic: it decides and never copies, waits or sleeps.

    Args:
        kinds: the model's groups of layers, by the rule of :class:`Kind`.
        page_size: tokens in a page, at least 1, the same for all kinds.
        capacity: tokens (states, for a recurrent kind) by ``(kind name, tier)``, rounded down to whole pages. Each
            kind needs ``Tier.DEVICE``; any other tier is there only when named. Pages are numbered from 1; page 0 is
            the padding target and never allocated.
        arenas: kinds that draw their device pages from one allocator, by the name that ``capacity`` then sizes it
            under instead of theirs: kinds whose pages take the same bytes and lie in the same buffers. A state of a
            recurrent kind among paged ones takes a page.
        max_leases: rows of the page tables.
        max_length: tokens in a row.
        policy: the order in which entries leave; see ``order.POLICIES``.
        write_policy: when the device's entries are copied to HOST: ``write_through`` (as requests leave them),
            ``write_through_selective`` (after ``write_hits`` requests resumed from them), ``write_back`` (as they are
            evicted). What arrives on HOST is copied on to STORAGE where there is one.
        min_load: tokens that a farther tier must add to a hit to be worth loading, by tier; 1 where not given.
        fingerprint: names model, revision and layout in digests: whatever changes a page's bytes.
        events: record KV events, for ``take_events`` (costs one SHA-256 a page).
        reuse: False makes it SGLang's ``ChunkCache``: nothing is ever shared, the verbs stay.

    Raises:
        ConfigError: a setting is wrong; the message says which.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        *,
        page_size: int = 16,
        capacity: Capacity,
        arenas: Mapping[str, Sequence[str]] | None = None,
        max_leases: int = 256,
        max_length: int = 32768,
        policy: str = "lru",
        reuse: bool = True,
        write_policy: str = "write_through",
        write_hits: int = 2,
        min_load: Mapping[Tier, int] | None = None,
        fingerprint: bytes = b"",
        events: bool = False,
    ) -> None:
        self.kinds = tuple(kinds)
        self.page_size = page_size
        shared = _shared(self.kinds, arenas or {}, capacity)
        sizes = _sizes(self.kinds, page_size, capacity, shared)
        self._tree = Tree(self.kinds, page_size, sizes, shared, policy)
        row = -(-max_length // page_size)
        widths = [2 if kind.rule == "recurrent" else row for kind in self.kinds]
        self.tables = ReqToTokenPool([kind.name for kind in self.kinds], widths, max_leases)
        self._traffic = Traffic(fingerprint)
        if write_policy not in WRITE_POLICIES:
            raise ConfigError(f"write_policy={write_policy!r} is unknown; choose one of {', '.join(WRITE_POLICIES)}")
        host = Tier.HOST in self._tree.tiers
        hits = {"write_through": 0, "write_through_selective": write_hits}.get(write_policy) if host else None
        if host and write_policy == "write_back":
            self._tree.spill = lambda node, shelf: spill(self._tree, self._traffic, node, shelf)
        self._desk = Desk(
            self._tree,
            self.tables,
            self._traffic,
            max_length=max_length,
            reuse=reuse,
            write_hits=hits,
            min_load=dict(min_load or {}),
        )
        self._tree.journal = Journal(self._tree, fingerprint) if events else None
        self._requests = 0
        self._input_tokens = 0
        self._hit_tokens = dict.fromkeys(self._tree.tiers, 0)

    # ---- the verbs ----------------------------------------------------------------------------------------------

    def match(self, key: Key) -> Hit:
        """How far ``key`` is cached, per tier. Changes nothing but recency. O(tokens matched + nodes on the path)."""
        hit = find(self._tree, key)
        touch(self._tree, hit)
        return hit

    def open(self, hit: Hit, tier: Tier = Tier.DEVICE, *, priority: int = 0) -> Lease | None:
        """Pin what the rule needs in order to resume at ``hit.reach(tier)``. None when there is no room for it.

        A stale hit (the tree changed since ``match``) is looked up again. Raises ``RequestTooLarge`` when the key
        is longer than ``max_length``.
        """
        if self._desk.expiries:
            control.expire(self._desk)
        if hit.version != self._tree.version:
            hit = find(self._tree, hit.key)
        lease = open_lease(self._desk, hit, tier, priority)
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

    def grow_many(self, leases: Sequence[Lease], tokens: int = 1) -> list[bool]:
        """:meth:`grow` for each lease of a decode batch, in order; False for those that found no room."""
        return grow_many(self._desk, leases, tokens)

    def commit(self, lease: Lease, key: Key, *, snapshot: bool = True) -> None:
        """Make the whole pages of ``key``, the request's first ``len(key)`` tokens, all computed, shareable.

        Where the tree has a page already the lease's duplicate is freed and its row points to the tree's page. Pages
        before the rule's start at ``len(key)`` leave the row. When ``key`` is all the lease has and ends on a page,
        ``snapshot`` hands the recurrent state to the tree (skipped when no state is free).
        Raises ``RequestError`` for a key longer than the lease or of another namespace.
        """
        commit(self._desk, lease, key, snapshot)

    def close(self, lease: Lease, keep: bool = True) -> None:
        """End a lease: finished, aborted and retracted alike. What was not committed is freed.

        ``keep=False`` also throws away what this request added to the tree and nobody else uses.
        """
        close(self._desk, lease, keep)

    def flush(self) -> None:
        """Forget everything. Raises ``CacheBusy`` while leases or copies are live."""
        leases, flights = len(self._desk.leases), len(self._traffic.flights)
        if leases or flights:
            raise CacheBusy(
                f"flush with {leases} live leases and {flights} copies under way; close the leases (finish or abort) "
                f"and report the copies first"
            )
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
        if isinstance(event, Found) and not self._desk.reuse:
            return
        for lease in learn(self._tree, self._traffic, event):
            if self._desk.leases.get(lease.row) is lease:
                fill_rows(self._desk, lease)

    def send(self, key: Key, dst: Tier) -> set[int]:
        """Plan to copy what resuming at the end of ``key`` needs, as far as it is cached, to ``dst``. Move ids."""
        hit = find(self._tree, key)
        return control.copy(self._desk, hit, hit.reach(Tier.DEVICE), dst)

    def save(self, dst: Tier = Tier.HOST) -> int:
        """Plan to copy all that only the device holds to ``dst``; returns the number of moves (before a drop)."""
        return control.save(self._desk, dst)

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
        (slots,) = (s.arena.slots for s in self._tree.shelves if s.kind.name == kind and s.tier is tier)
        used = np.ones(slots.pages + 1, np.bool_)
        used[0] = False
        used[slots.free_list()] = False
        return np.flatnonzero(used).astype(np.int32)

    def stats(self) -> CacheStats:
        """Counts per kind and tier and running totals. O(kinds * tiers)."""
        return CacheStats(
            shelves={(s.kind.name, s.tier): shelf_stats(self._tree, s) for s in self._tree.shelves},
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

    def explain(self, key: Key) -> Explanation:
        """Why ``key`` hits as far as it does. Changes nothing, not even recency."""
        return explain(self._tree, key)

    def pretty_print(self, limit: int = 100) -> str:
        """The tree in words, at most ``limit`` nodes."""
        return pretty_print(self._tree, limit)

    def check(self) -> None:
        """Recount every invariant, O(cache). Raises ``CacheBroken`` with the evidence."""
        check(self._desk)


def _shared(kinds: tuple[Kind, ...], arenas: Mapping[str, Sequence[str]], capacity: Capacity) -> dict[int, str]:
    """The arena of each kind that shares one, by index of kind, checked."""
    names = [kind.name for kind in kinds]
    shared: dict[int, str] = {}
    for arena, members in arenas.items():
        if arena in names or (arena, Tier.DEVICE) not in capacity:
            raise ConfigError(
                f"arenas names {arena!r}: give it a name that no kind has, and capacity[{arena!r}, Tier.DEVICE]"
            )
        for name in members:
            if name not in names or names.index(name) in shared or (name, Tier.DEVICE) in capacity:
                raise ConfigError(
                    f"arenas[{arena!r}] names {name!r}: name kinds of {names}, each in one arena, and leave "
                    f"({name!r}, Tier.DEVICE) out of capacity"
                )
            shared[names.index(name)] = arena
    return shared


def _sizes(
    kinds: tuple[Kind, ...], page_size: int, capacity: Capacity, shared: Mapping[int, str]
) -> dict[tuple[int, Tier], int]:
    """The capacity by index of kind, checked; a kind that shares an arena has the arena's."""
    if page_size < 1:
        raise ConfigError(f"page_size={page_size}: a page has at least 1 token")
    names = [kind.name for kind in kinds]
    if not kinds or len(set(names)) != len(names):
        raise ConfigError(f"kinds={names}: give at least one kind, each with a name of its own")
    sizes: dict[tuple[int, Tier], int] = {}
    for (name, tier), size in capacity.items():
        members = [k for k, arena in shared.items() if arena == name]
        if name not in names and not (members and tier == Tier.DEVICE):
            raise ConfigError(f"capacity names the kind {name!r}; the kinds are {names}")
        if size < 0:
            raise ConfigError(f"capacity[{name!r}, {Tier(tier).name}]={size}: give a number of tokens, at least 0")
        for k in members or [names.index(name)]:
            sizes[k, Tier(tier)] = size
    for k, name in enumerate(names):
        if (k, Tier.DEVICE) not in sizes:
            raise ConfigError(f"capacity lacks ({name!r}, Tier.DEVICE): every kind needs room on the device")
    return sizes
