"""What the radix tree is made of: nodes, the entries they hold, the shelves that entries stand on, and the arenas
whose pages they take.

A **node** is an edge of whole pages. An **entry** is the contiguous run of pages that a node holds on one **shelf**
(one kind on one tier). Three shapes occur, and ``check`` insists on them:

    full attention       all pages of the node            [..............]   entry.lo == 0, len(pages) == node.size
    window, chunk        a tail of the node               [      ........]   the head leaves first: it serves only
                                                                              boundaries inside the edge
    recurrent            the last page stands for the     [             s]   one state, at the node's end
                         state after the node

A node is *held* (``refs > 0``) while a lease, a move or a prefix pin has its place at it or below it. ``refs`` counts
places at the node plus held children, so taking a hold climbs only until it meets a node that is held already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.adaptive import LearnedOrder, Shadow
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.order import Item, Order
from rootcellar.cache.slots import Pages, SlotAllocator

if TYPE_CHECKING:
    from rootcellar.cache.moves import Flight


class Entry:
    """Pages ``[lo, lo + len(pages))`` of a node, counted from the node's start; ``evictable`` of them may leave."""

    __slots__ = ("evictable", "item", "lo", "pages", "shelf")

    def __init__(self, shelf: Shelf, pages: Pages, lo: int) -> None:
        self.shelf = shelf
        self.pages = pages
        self.lo = lo
        self.evictable = 0
        self.item: Item | None = None  # this entry's live item in the arena's order


class Node:
    """An edge of ``size`` pages that starts at page ``start`` of its keys."""

    __slots__ = (
        "children",
        "covers",
        "created",
        "digests",
        "entries",
        "flights",
        "group",
        "hits",
        "id",
        "kids",
        "namespace",
        "owner",
        "parent",
        "priority",
        "refs",
        "size",
        "start",
        "starts",
        "ticks",
        "tokens",
        "used",
    )

    def __init__(self, ident: int, parent: Node | None, tokens: NDArray[np.int64], start: int, size: int) -> None:
        self.id = ident
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.tokens = tokens
        self.start = start
        self.size = size
        self.entries: list[Entry | None] = []  # by shelf
        self.kids: list[int] = []  # by shelf: children that hold an entry there
        self.refs = 0
        self.covers: list[int] = []  # by kind: pins that cover the node from its start
        self.starts: list[dict[int, int]] = []  # by kind: absolute page where a pin starts inside the node -> how many
        self.ticks: list[int] = []  # by kind: when the node last served that kind
        self.created: int = 0
        self.hits: int = 0
        self.priority: int = 0
        self.owner = 0  # serial of the lease that added the node
        self.flights: list[Flight] = []
        self.digests: list[bytes] = []
        self.namespace = ""  # of a root
        self.group: int = 0  # the adaptive policy's class, and the volume at the last use
        self.used: int = 0

    @property
    def end(self) -> int:
        """First page after the node."""
        return self.start + self.size


class Arena:
    """Pages that one shelf has for itself or several share, and the one order in which their entries leave.

    Shared pages belong to whichever kind took them: no split has to be guessed beforehand, and what leaves next is the
    worst entry of all kinds (Jenga, Zhang et al. 2025, and vLLM's hybrid KV cache manager share pages alike).
    """

    __slots__ = ("evictable", "name", "order", "slots")

    def __init__(self, name: str, slots: SlotAllocator, shadow: Shadow | None) -> None:
        self.name = name
        self.slots = slots
        self.order: Order | LearnedOrder = Order() if shadow is None else LearnedOrder(shadow)
        self.evictable = 0

    @property
    def room(self) -> int:
        """Pages that could be had now: free, or evictable."""
        return self.slots.free_pages + self.evictable


class Shelf:
    """One kind on one tier: the arena that its pages come from, and its counts (all in pages)."""

    __slots__ = (
        "arena",
        "cached",
        "entries",
        "evictable",
        "evicted",
        "full",
        "in_flight",
        "index",
        "kind",
        "kind_index",
        "tier",
        "used",
    )

    def __init__(
        self,
        index: int,
        kind: Kind,
        kind_index: int,
        tier: Tier,
        arena: Arena,
    ) -> None:
        self.index = index
        self.kind = kind
        self.kind_index = kind_index
        self.tier = tier
        self.full = kind.rule == "full"
        self.arena = arena
        self.used = 0  # taken from the arena and not given back
        self.entries = 0  # entries in the tree
        self.cached = 0
        self.evictable = 0
        self.in_flight = 0  # destinations of moves
        self.evicted = 0

    def take(self, count: int) -> Pages:
        """``count`` free pages; the caller has made room for them."""
        self.used += count
        return self.arena.slots.take(count)

    def give(self, pages: Pages) -> None:
        """Return pages taken before."""
        self.used -= len(pages)
        self.arena.slots.give(pages)
