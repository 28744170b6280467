"""What the radix tree is made of: nodes, the entries they hold, and the copies under way to and from them.

A **node** is an edge of whole pages. An **entry** is the contiguous run of pages that a node holds on one **shelf**
(one kind on one tier). Three shapes occur, and ``check`` insists on them:

    full attention       all pages of the node            [..............]   entry.lo == 0, len(pages) == node.size
    window, chunk        a tail of the node               [      ........]   the head leaves first: it serves only
                                                                              boundaries inside the edge
    recurrent            the last page stands for the     [             s]   one state, at the node's end
                         state after the node

A node is *held* while a lease, a move or a prefix pin has its place at it or below it. ``refs`` counts places at the
node plus children of which it is not 0, so taking a hold climbs only until it meets a node that is held already.
``far`` is the same of moves that leave the device alone: for their sake the device may still evict what it has.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.kind import Tier
from rootcellar.cache.slots import Pages

Standing = tuple[float, ...]
"""Where an entry stands in its arena's order of leaving: the smallest leaves first."""
Item = tuple[Standing, int, "Node", "Entry"]
"""An entry as an order has it filed: its standing, a serial number, and what it is."""


class Entry:
    """Pages ``[lo, lo + len(pages))`` of a node, counted from the node's start; ``evictable`` of them may leave.

    ``shelf`` is the index of the shelf that it stands on.
    """

    __slots__ = ("evictable", "item", "lo", "pages", "shelf")

    def __init__(self, shelf: int, pages: Pages, lo: int) -> None:
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
        "dues",
        "entries",
        "far",
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
        "turns",
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
        self.refs = self.far = 0
        self.covers: list[int] = []  # by kind: pins that cover the node from its start
        self.starts: list[dict[int, int]] = []  # by kind: absolute page where a pin starts inside the node -> how many
        self.ticks: list[int] = []  # by kind: when the node last served that kind
        self.dues: list[int] = []  # by kind: when it is wanted again (see ``expect``); 0: nobody said
        self.turns: list[int] = []  # by kind: place in line of the first who waits for it (``foresee``); 0: none
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
    def held(self) -> bool:
        """Whether the node has to stay where it is."""
        return self.refs > 0 or self.far > 0

    @property
    def end(self) -> int:
        """First page after the node."""
        return self.start + self.size

    def count_hit(self, priority: int) -> None:
        """Note that a request of this priority resumed at the node's end, which every node above serves too."""
        climb: Node | None = self
        while climb is not None:
            climb.hits += 1
            climb.priority = max(climb.priority, priority)
            climb = climb.parent


class Waiter(Protocol):
    """Whoever cannot go on before copies are done: a lease."""

    row: int
    serial: int
    waits: set[int]
    lost: bool


class Flight:
    """A move under way, as the tree sees it: pages ``[start, node.end)`` of one kind, on the path to ``node``.

    ``node`` is the lowest node; when it is split, the parts above are found by climbing to ``start``. ``held`` says
    that the flight holds its place and its source; what is written down from the device is read at once and is not.
    ``node`` is None when the place was thrown away meanwhile. ``after`` is the flight that has to bring the pages to
    ``src`` first: until it is done, nobody is told of this one.
    """

    __slots__ = ("after", "dst", "held", "id", "kind_index", "node", "slots", "src", "start", "waiters")

    def __init__(self, ident: int, kind_index: int, src: Tier, dst: Tier, start: int, slots: Pages, held: bool) -> None:
        self.id = ident
        self.kind_index = kind_index
        self.src = src
        self.dst = dst
        self.start = start
        self.slots = slots
        self.held = held
        self.node: Node | None = None
        self.after: Flight | None = None
        self.waiters: list[Waiter] = []

    @property
    def far(self) -> bool:
        """Whether the device has no part in it."""
        return Tier.DEVICE not in (self.src, self.dst)

    def blocks(self, kind_index: int, tier: Tier) -> bool:
        """Whether entries of this kind on this tier must stay where they are until the flight ends."""
        return kind_index == self.kind_index and (tier is self.dst or (self.held and tier is self.src))
