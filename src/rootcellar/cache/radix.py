"""``RadixCache``: the cache as a scheduler sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rootcellar.cache.check import check
from rootcellar.cache.evict import drop_subtree
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.match import Hit, find, touch
from rootcellar.cache.stats import CacheStats, shelf_stats
from rootcellar.cache.tree import Tree
from rootcellar.cache.verbs import Desk, close, commit, grow, grow_many, open_lease
from rootcellar.errors import CacheBusy, ConfigError

Capacity = Mapping[tuple[str, Tier], int]


class RadixCache:
    """A prefix cache over the kinds and tiers it is given. Pure logic: it decides and never copies, waits or sleeps.

    Args:
        kinds: the model's groups of layers, by the rule of :class:`Kind`.
        page_size: tokens in a page, at least 1, the same for all kinds.
        capacity: tokens (states, for a recurrent kind) by ``(kind name, tier)``, rounded down to whole pages. Each
            kind needs ``Tier.DEVICE``; any other tier is there only when named. Pages are numbered from 1; page 0 is
            the padding target and never allocated.
        max_leases: rows of the page tables.
        max_length: tokens in a row.
        policy: the order in which entries leave; see ``order.POLICIES``.
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
        max_leases: int = 256,
        max_length: int = 32768,
        policy: str = "lru",
        reuse: bool = True,
    ) -> None:
        self.kinds = tuple(kinds)
        self.page_size = page_size
        sizes = _sizes(self.kinds, page_size, capacity)
        self._tree = Tree(self.kinds, page_size, sizes, policy)
        row = -(-max_length // page_size)
        widths = [2 if kind.rule == "recurrent" else row for kind in self.kinds]
        self.tables = ReqToTokenPool([kind.name for kind in self.kinds], widths, max_leases)
        self._desk = Desk(self._tree, self.tables, max_length, reuse)
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
        lease = open_lease(self._desk, hit, priority)
        if lease is not None:
            self._requests += 1
            self._input_tokens += len(hit.key)
            self._hit_tokens[Tier.DEVICE] += lease.cached
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
        if self._desk.leases:
            raise CacheBusy(f"flush with {len(self._desk.leases)} live leases; close them first (finish or abort)")
        for root in self._tree.roots.values():
            for child in list(root.children.values()):
                drop_subtree(self._tree, child)
        self._tree.roots.clear()

    # ---- sight --------------------------------------------------------------------------------------------------

    def available_tokens(self) -> int:
        """Tokens that could be grown now: free plus evictable, the least over the paged kinds. O(1)."""
        return min((shelf.room for shelf in self._desk.paged), default=0) * self.page_size

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

    def check(self) -> None:
        """Recount every invariant, O(cache). Raises ``CacheBroken`` with the evidence."""
        check(self._desk)


def _sizes(kinds: tuple[Kind, ...], page_size: int, capacity: Capacity) -> dict[tuple[int, Tier], int]:
    """The capacity by index of kind, checked."""
    if page_size < 1:
        raise ConfigError(f"page_size={page_size}: a page has at least 1 token")
    names = [kind.name for kind in kinds]
    if not kinds or len(set(names)) != len(names):
        raise ConfigError(f"kinds={names}: give at least one kind, each with a name of its own")
    sizes: dict[tuple[int, Tier], int] = {}
    for (name, tier), size in capacity.items():
        if name not in names:
            raise ConfigError(f"capacity names the kind {name!r}; the kinds are {names}")
        if size < 0:
            raise ConfigError(f"capacity[{name!r}, {Tier(tier).name}]={size}: give a number of tokens, at least 0")
        sizes[names.index(name), Tier(tier)] = size
    for k, name in enumerate(names):
        if (k, Tier.DEVICE) not in sizes:
            raise ConfigError(f"capacity lacks ({name!r}, Tier.DEVICE): every kind needs room on the device")
    return sizes
