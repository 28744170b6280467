"""One cache as its verbs see it: leases, page tables, copies under way, and the tree."""

from __future__ import annotations

from collections.abc import Iterator

from rootcellar.cache.flights import Traffic
from rootcellar.cache.kind import Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.match import Hit
from rootcellar.cache.node import Node
from rootcellar.cache.settings import Settings
from rootcellar.cache.shelf import Shelf
from rootcellar.cache.slots import Pages
from rootcellar.cache.tree import Tree


class Cache:
    """One cache as its verbs see it: leases, page tables, copies under way, and the tree."""

    def __init__(self, tree: Tree, tables: ReqToTokenPool, traffic: Traffic, given: Settings) -> None:
        self.tree = tree
        self.traffic = traffic
        self.given = given
        self.pins: dict[int, Lease] = {}  # pinned prefixes, by serial
        self.expiries: list[tuple[int, int]] = []  # heap of (tick, serial of a pin)
        self.offers: dict[int, Lease] = {}  # what peers may fetch, by the manifest's id
        self.tables = tables
        self.free_rows = list(range(given.max_leases, 0, -1))  # the last is taken next
        self.leases: dict[int, Lease] = {}  # by row
        self.serial = 0
        device = [shelf for shelf in tree.by_tier[Tier.DEVICE] if shelf is not None]
        self.paged: list[Shelf] = [shelf for shelf in device if shelf.kind.rule != "recurrent"]
        self.windows: list[Shelf] = [shelf for shelf in self.paged if not shelf.full]
        self.states: list[Shelf] = [shelf for shelf in device if shelf.kind.rule == "recurrent"]

    def places(self) -> Iterator[tuple[Node, bool]]:
        """The node of every live hold, as often as it is held, and whether the device has no part in that."""
        for lease in self.holders():
            yield lease.node, False
        for flight in self.traffic.flights.values():
            if flight.held and flight.node is not None:
                yield flight.node, flight.far

    def holders(self) -> Iterator[Lease]:
        """Live leases, pins of prefixes and what peers may fetch."""
        yield from self.leases.values()
        yield from self.pins.values()
        yield from self.offers.values()

    def busy(self, tier: Tier | None = None) -> tuple[int, int]:
        """Live leases, and copies under way: what the cache, or one tier of it, must not be emptied under."""
        copies = sum(tier in (None, flight.src, flight.dst) for flight in self.traffic.flights.values())
        if tier not in (None, Tier.DEVICE):
            return 0, copies
        return len(self.leases), copies + len(self.offers)

    def in_flight(self, shelf: Shelf) -> list[Pages]:
        """Slots that copies under way will fill."""
        return [
            flight.slots
            for flight in self.traffic.flights.values()
            if flight.kind_index == shelf.kind_index and flight.dst is shelf.tier
        ]

    def boundary(self, hit: Hit, tier: Tier) -> int:
        """Tokens to resume at when ``tier`` may be loaded from: a tier that adds less than ``min_load`` is left out."""
        reach = hit.length
        for farther in self.tree.tiers:
            if farther <= tier and hit.reach(farther) - reach >= self.given.loads[farther]:
                reach = hit.reach(farther)
        return reach

    def start_page(self, k: int, tokens: int) -> int:
        """First page that kind ``k`` needs in order to resume at ``tokens``."""
        return self.tree.kinds[k].start(tokens) // self.tree.page_size


def pin_place(cache: Cache, lease: Lease) -> None:
    """Hold a lease's place and pin what resuming there needs."""
    tree = cache.tree
    lease.starts = [cache.start_page(k, lease.cached) for k in range(len(tree.kinds))]
    lease.sources = [None] * len(tree.kinds)
    tree.hold(lease.node)
    pin_windows(cache, lease, 1)
    pin_sources(cache, lease, lease.node)


def unpin_place(cache: Cache, lease: Lease) -> None:
    """Undo :func:`pin_place`, wherever the place is by now."""
    pin_windows(cache, lease, -1)
    pin_sources(cache, lease, None)
    cache.tree.release(lease.node)


def pin_sources(cache: Cache, lease: Lease, node: Node | None) -> None:
    """Pin the snapshots at a node's end (None: at none) in place of those the lease has pinned."""
    for shelf in cache.states:
        k = shelf.kind_index
        old = lease.sources[k]
        if node is not None and node.parent is not None:
            cache.tree.pin(node, k, node.end - 1, 1)
        if old is not None and old.parent is not None:
            cache.tree.pin(old, k, old.end - 1, -1)
        lease.sources[k] = node


def pin_windows(cache: Cache, lease: Lease, count: int) -> None:
    """Pin (1) or unpin (-1) what the lease's place needs of each window and chunk."""
    for shelf in cache.windows:
        cache.tree.pin(lease.node, shelf.kind_index, lease.starts[shelf.kind_index], count)
