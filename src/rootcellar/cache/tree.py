"""The radix tree: where nodes hang, what they hold, and what keeps an entry from leaving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.adaptive import Shadow
from rootcellar.cache.digest import Naming
from rootcellar.cache.journal import Evictions, Journal
from rootcellar.cache.kind import Tier
from rootcellar.cache.node import Entry, Node
from rootcellar.cache.ranking import Ranking
from rootcellar.cache.settings import Settings
from rootcellar.cache.shelf import Arena, Shelf
from rootcellar.cache.slots import Pages, SlotAllocator

Element = TypeVar("Element", bound=np.generic)


def _part(array: NDArray[Element], begin: int, end: int) -> NDArray[Element]:
    """``array[begin:end]``, as a copy where a view would keep more than twice its size in memory."""
    part = array[begin:end]
    whole = array if array.base is None else array.base
    return part if 2 * part.nbytes >= whole.nbytes else part.copy()


class Tree:
    """Nodes and shelves: everything structural, nothing that decides."""

    def __init__(self, given: Settings, capacity: Mapping[tuple[int, Tier], int]) -> None:
        """``capacity``: the settings' ``sizes``, or zeros for a tree that is only read."""
        kinds, page_size, shared = given.kinds, given.page_size, given.shared
        self.kinds = kinds
        self.page_size = page_size
        self.shadow = Shadow(given.device_size, page_size) if given.policy == "adaptive" else None
        self.naming = Naming(page_size, given.fingerprint)
        self.journal: Journal | None = None  # told of pages that come and go, when KV events are wanted
        self.evictions = Evictions()
        self.spill: Callable[[Node, Shelf], None] | None = None  # told of an entry about to be evicted (write-back)
        self.tick = 0
        self.version = 0  # counts structural changes: a Hit is fresh while it has not moved
        self.nodes = 0
        self.last_id = 0
        self.roots: dict[str, Node] = {}
        self.shelves: list[Shelf] = []
        self.tiers: list[Tier] = sorted({tier for _, tier in capacity})
        self.by_tier: dict[Tier, list[Shelf | None]] = {tier: [None] * len(kinds) for tier in Tier}
        arenas: dict[str, Arena] = {}
        for (k, tier), size in sorted(capacity.items(), key=lambda item: (item[0][1], item[0][0])):
            kind = kinds[k]
            owner = shared[k] if k in shared and (shared[k], tier) in given.capacity else kind.name
            name = owner if owner == shared.get(k) and tier is Tier.DEVICE else f"{owner} on {tier.name}"
            if name not in arenas:
                mates = [kinds[m] for m in shared if shared[m] == owner] or [kind]
                states = all(mate.rule == "recurrent" for mate in mates)
                arenas[name] = Arena(name, SlotAllocator(size, 1 if states else page_size), self.shadow)
            shelf = Shelf(len(self.shelves), kind, k, tier, arenas[name])
            self.shelves.append(shelf)
            self.by_tier[tier][k] = shelf
        self.arenas = list(arenas.values())
        self.ranking = Ranking(kinds, page_size, given.policy, self.by_tier)
        self.full_shelves = [s for s in self.shelves if s.full]
        self.window_shelves = [s for s in self.shelves if not s.full]
        self.windows = [k for k, kind in enumerate(kinds) if kind.rule != "full"]
        self.fulls = [k for k, kind in enumerate(kinds) if kind.rule == "full"]
        self.queued: dict[Node, None] = {}  # nodes that have a turn
        self.detached: list[Node] = []  # roots of dropped namespaces that leases or flights still hold
        # Boundaries (in pages) at which a kind needs nothing; 0: none.
        self.resets = [int(np.lcm(kind.reset, page_size)) // page_size if kind.reset else 0 for kind in kinds]

    # ---- structure ----------------------------------------------------------------------------------------------

    def root(self, namespace: str) -> Node:
        """The root of a namespace, made when missing."""
        node = self.roots.get(namespace)
        if node is None:
            node = self.roots[namespace] = self._blank(None, np.empty(0, np.int64), 0, 0)
            node.namespace = namespace
        return node

    def _blank(self, parent: Node | None, tokens: NDArray[np.int64], start: int, size: int) -> Node:
        self.last_id += 1
        node = Node(self.last_id, parent, tokens, start, size)
        node.entries = [None] * len(self.shelves)
        node.kids = [0] * len(self.shelves)
        node.covers = [0] * len(self.kinds)
        node.starts = [{} for _ in self.kinds]
        node.ticks = [self.tick] * len(self.kinds)
        node.dues = [0] * len(self.kinds)
        node.turns = [0] * len(self.kinds)
        node.created = self.tick
        return node

    def first(self, tokens: NDArray[np.int64], page: int) -> bytes:
        """What a child whose edge begins with this page of ``tokens`` is filed under."""
        return tokens[page * self.page_size : (page + 1) * self.page_size].tobytes()

    def add(self, parent: Node, tokens: NDArray[np.int64], size: int) -> Node:
        """A new child of ``parent`` with an edge of ``size`` pages, holding nothing yet."""
        node = self._blank(parent, tokens.copy(), parent.end, size)
        parent.children[self.first(tokens, 0)] = node
        self.nodes += 1
        self.version += 1
        self._requeue_states(parent)
        return node

    def common(self, node: Node, tokens: NDArray[np.int64], limit: int) -> int:
        """How many leading pages of the node's edge equal ``tokens`` (which has ``limit`` whole pages left)."""
        size = node.size if node.size < limit else limit
        if size == 1:
            return 1  # it was found by that page
        span = size * self.page_size
        differs = node.tokens[:span] != tokens[:span]
        at = int(differs.argmax())
        return at // self.page_size if differs[at] else size

    def split(self, node: Node, at: int) -> Node:
        """Cut an edge after ``at`` pages. The new upper part is returned; ``node`` stays the lower part.

        Places, pins and moves end at a node's end, so the lower part keeps them; what also covers the upper part is
        found from the absolute page it starts at.
        """
        parent = node.parent
        assert parent is not None
        assert 0 < at < node.size
        cut = at * self.page_size
        upper = self._blank(parent, _part(node.tokens, 0, cut), node.start, at)
        upper.created, upper.hits, upper.priority, upper.owner = node.created, node.hits, node.priority, node.owner
        upper.ticks = node.ticks.copy()
        upper.dues = node.dues.copy()
        if node in self.queued:
            upper.turns = node.turns.copy()
            self.queued[upper] = None
        upper.group, upper.used = node.group, node.used
        upper.refs, upper.far = int(node.refs > 0), int(node.far > 0)
        upper.digests, node.digests = node.digests[:at], node.digests[at:]
        parent.children[self.first(node.tokens, 0)] = upper
        node.tokens = _part(node.tokens, cut, len(node.tokens))
        node.start += at
        node.size -= at
        node.parent = upper
        upper.children[self.first(node.tokens, 0)] = node
        upper.flights = [flight for flight in node.flights if flight.start < node.start]
        for k in self.windows:
            upper.covers[k] = node.covers[k]
            if node.starts[k]:
                above = {p: c for p, c in node.starts[k].items() if p < node.start}
                node.covers[k] += sum(above.values()) + node.starts[k].get(node.start, 0)
                node.starts[k] = {p: c for p, c in node.starts[k].items() if p > node.start}
                upper.starts[k] = above
        self.nodes += 1
        self.version += 1
        self._split_entries(parent, upper, node, at)
        return upper

    def _split_entries(self, parent: Node, upper: Node, lower: Node, at: int) -> None:
        for shelf in self.shelves:
            s = shelf.index
            entry = lower.entries[s]
            if entry is None:
                continue
            upper.kids[s] = 1
            if entry.lo >= at:
                entry.lo -= at
                parent.kids[s] -= 1
            else:
                upper.entries[s] = Entry(s, _part(entry.pages, 0, at - entry.lo), entry.lo)
                entry.pages = _part(entry.pages, at - entry.lo, len(entry.pages))
                entry.lo = 0
                shelf.entries += 1
                self.refresh(upper, shelf)
            self.refresh(lower, shelf)

    def discard(self, node: Node) -> None:
        """Take a childless, unheld node that holds nothing out of the tree, and each ancestor that this empties."""
        while True:
            if node.held or node.children or node.flights or any(node.entries):
                return
            parent = node.parent
            if parent is None:
                self._forget_root(node)
                return
            del parent.children[self.first(node.tokens, 0)]
            node.parent = None
            self.queued.pop(node, None)
            self.nodes -= 1
            self.version += 1
            self._requeue_states(parent)
            node = parent

    def _forget_root(self, root: Node) -> None:
        """Namespaces come and go (tenants, weight versions): an empty one leaves nothing behind."""
        if self.roots.get(root.namespace) is root:
            del self.roots[root.namespace]
        elif root in self.detached:
            self.detached.remove(root)

    # ---- entries ------------------------------------------------------------------------------------------------

    def attach(self, node: Node, shelf: Shelf, pages: Pages, lo: int) -> None:
        """Give the node ``pages`` at ``lo`` on a shelf; what it holds there already must begin where they end."""
        entry = node.entries[shelf.index]
        if entry is None:
            node.entries[shelf.index] = Entry(shelf.index, pages, lo)
            shelf.entries += 1
            if node.parent is not None:
                node.parent.kids[shelf.index] += 1
        else:
            assert lo + len(pages) == entry.lo
            entry.pages = np.concatenate([pages, entry.pages])
            entry.lo = lo
        shelf.cached += len(pages)
        self.version += 1
        self.refresh(node, shelf)
        self.restage(node)
        if self.journal is not None:
            self.journal.came(node, shelf, lo, len(pages))

    def extend(self, node: Node, tokens: NDArray[np.int64], size: int, pages: list[Pages]) -> None:
        """Lengthen a leaf that only DEVICE holds, by ``size`` pages: ``pages`` by kind."""
        node.tokens = np.concatenate([node.tokens, tokens])
        node.size += size
        for shelf in self.by_tier[Tier.DEVICE]:
            if shelf is not None and shelf.kind.rule != "recurrent":
                entry = node.entries[shelf.index]
                assert entry is not None
                entry.pages = np.concatenate([entry.pages, pages[shelf.kind_index]])
                shelf.cached += size
                self.refresh(node, shelf)
                if self.journal is not None:
                    self.journal.came(node, shelf, node.size - size, size)
        self.version += 1

    def detach(self, node: Node, shelf: Shelf, count: int) -> Pages:
        """Take the first ``count`` pages of an entry off the shelf and return them; the caller owns them now."""
        entry = node.entries[shelf.index]
        assert entry is not None
        pages = entry.pages[:count]
        if self.journal is not None:
            self.journal.left(node, shelf, entry.lo, len(pages))
        shelf.cached -= len(pages)
        self.version += 1
        if count >= len(entry.pages):
            shelf.evictable -= entry.evictable
            shelf.arena.evictable -= entry.evictable
            shelf.entries -= 1
            shelf.arena.order.forget(entry)
            node.entries[shelf.index] = None
            if node.parent is not None:
                node.parent.kids[shelf.index] -= 1
                self.refresh(node.parent, shelf)
        else:
            entry.pages = _part(entry.pages, count, len(entry.pages))
            entry.lo += count
            self.refresh(node, shelf)
        return pages

    def holds_any(self, node: Node, k: int) -> bool:
        """Whether a node has an entry of kind ``k`` on any tier, or one on its way."""
        for tier in self.tiers:
            shelf = self.by_tier[tier][k]
            if shelf is not None and node.entries[shelf.index] is not None:
                return True
        return any(flight.kind_index == k for flight in node.flights)

    def dead(self, node: Node) -> bool:
        """Whether no boundary in or below the node can be reached: a full-attention kind is nowhere to be had."""
        for shelf in self.full_shelves:
            if node.entries[shelf.index] is None and not self.holds_any(node, shelf.kind_index):
                return True
        return False

    def refresh(self, node: Node, shelf: Shelf) -> None:
        """Recount what may leave of an entry after its pages, pins or holds changed, and queue it if something may."""
        entry = node.entries[shelf.index]
        if entry is None:
            return
        if shelf.full:
            evictable = 0 if node.refs or (node.far and shelf.tier is not Tier.DEVICE) else len(entry.pages)
            ready = evictable > 0 and node.kids[shelf.index] == 0
        else:
            evictable = self.unpinned(node, shelf, entry)
            ready = evictable > 0
        if evictable != entry.evictable:
            shelf.evictable += evictable - entry.evictable
            shelf.arena.evictable += evictable - entry.evictable
            entry.evictable = evictable
        if ready and entry.item is None:
            shelf.arena.order.push(node, entry, self.ranking.standing(node, shelf, entry))

    def unpinned(self, node: Node, shelf: Shelf, entry: Entry) -> int:
        """Leading pages of a window, chunk or recurrent entry that no lease and no move needs."""
        for flight in node.flights:
            if flight.blocks(shelf.kind_index, shelf.tier):
                return 0
        if shelf.tier is not Tier.DEVICE:
            return len(entry.pages)
        k = shelf.kind_index
        if node.covers[k]:
            return 0
        starts = node.starts[k]
        first = min(starts) - node.start if starts else node.size
        return max(0, min(first - entry.lo, len(entry.pages)))

    # ---- holds and pins -----------------------------------------------------------------------------------------

    def hold(self, node: Node, *, far: bool = False) -> None:
        """Keep a place in the tree: the node and all above it stay, with their full-attention entries.

        ``far``: but for those that the device has.
        """
        climb: Node | None = node
        while climb is not None:
            if far:
                climb.far += 1
            else:
                climb.refs += 1
            if (climb.far if far else climb.refs) > 1:
                return
            for shelf in self.full_shelves:
                self.refresh(climb, shelf)
            climb = climb.parent

    def release(self, node: Node, *, far: bool = False) -> None:
        """Undo one :meth:`hold`."""
        climb: Node | None = node
        while climb is not None:
            if far:
                climb.far -= 1
            else:
                climb.refs -= 1
            if climb.far if far else climb.refs:
                return
            for shelf in self.full_shelves:
                self.refresh(climb, shelf)
            climb = climb.parent

    def pin(self, node: Node, k: int, start: int, count: int) -> None:
        """Pin kind ``k`` on the device from page ``start`` to the node's end; ``count`` -1 undoes it."""
        shelf = self.by_tier[Tier.DEVICE][k]
        assert shelf is not None
        climb = node
        while start < climb.end:
            if start > climb.start:
                starts = climb.starts[k]
                left = starts.get(start, 0) + count
                if left:
                    starts[start] = left
                else:
                    del starts[start]
                self.refresh(climb, shelf)
                return
            climb.covers[k] += count
            self.refresh(climb, shelf)
            if start == climb.start:
                return
            assert climb.parent is not None
            climb = climb.parent

    def use(self, node: Node, starts: list[int]) -> None:
        """Note that a boundary at the node's end was used now: each kind from its page in ``starts`` on."""
        climb = node
        volume = self.shadow.volume if self.shadow is not None else 0
        while climb.parent is not None:
            climb.used = volume
            for k, start in enumerate(starts):
                if start < climb.end:
                    climb.ticks[k] = self.tick
                    climb.dues[k] = max(climb.dues[k], 0)  # it was asked for after all
            if self.ranking.shrinks:
                for shelf in self.shelves:
                    self.requeue(climb, shelf)
            climb = climb.parent

    def expect(self, node: Node, k: int, due: int) -> None:
        """Note when kind ``k`` of a node is wanted again (see :data:`NEVER`); 0: nobody knows."""
        if node.dues[k] != due:
            node.dues[k] = due
            for tier in self.tiers:
                shelf = self.by_tier[tier][k]
                if shelf is not None:
                    self.requeue(node, shelf)

    # ---- filed as the ranking says -------------------------------------------------------------------------------

    def restage(self, node: Node) -> None:
        """Requeue a node's entries whose key may have become smaller (an order only finds larger keys by itself)."""
        if self.windows:
            for shelf in self.shelves:
                self.requeue(node, shelf)

    def requeue(self, node: Node, shelf: Shelf) -> None:
        """File an entry that is queued already under its present key."""
        entry = node.entries[shelf.index]
        if entry is not None and entry.item is not None:
            shelf.arena.order.push(node, entry, self.ranking.standing(node, shelf, entry))

    def _requeue_states(self, node: Node) -> None:
        for shelf in self.window_shelves:
            if shelf.kind.rule == "recurrent":
                self.requeue(node, shelf)
        if self.windows:
            for shelf in self.full_shelves:
                self.requeue(node, shelf)
