"""What the radix tree is made of: nodes, the entries they hold, and the shelves that entries stand on.

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

    __slots__ = ("evictable", "item", "lo", "pages")

    def __init__(self, pages: Pages, lo: int) -> None:
        self.pages = pages
        self.lo = lo
        self.evictable = 0
        self.item: Item | None = None  # this entry's live item in the shelf's order


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


class Shelf:
    """One kind on one tier: its slots, the order in which its entries leave, and its counts (all in pages)."""

    __slots__ = (
        "cached",
        "entries",
        "evictable",
        "evicted",
        "full",
        "in_flight",
        "index",
        "kind",
        "kind_index",
        "order",
        "slots",
        "tier",
    )

    def __init__(
        self,
        index: int,
        kind: Kind,
        kind_index: int,
        tier: Tier,
        size: int,
        page_size: int,
        shadow: Shadow | None,
    ) -> None:
        self.index = index
        self.kind = kind
        self.kind_index = kind_index
        self.tier = tier
        self.full = kind.rule == "full"
        self.slots = SlotAllocator(size, 1 if kind.rule == "recurrent" else page_size)
        self.order: Order | LearnedOrder = Order() if shadow is None else LearnedOrder(shadow)
        self.entries = 0  # entries in the tree
        self.cached = 0
        self.evictable = 0
        self.in_flight = 0  # destinations of moves
        self.evicted = 0

    @property
    def room(self) -> int:
        """Pages that could be had now: free, or evictable."""
        return self.slots.free_pages + self.evictable
