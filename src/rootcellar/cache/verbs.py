"""The life of a lease: open, grow, commit, close."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import words
from rootcellar.cache.adaptive import mix
from rootcellar.cache.digest import page_digests
from rootcellar.cache.evict import drop_subtree, fits, make_room_for, prune
from rootcellar.cache.flights import Traffic, call_off, fetch, flying_to, missing, sources, write_through
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.match import Hit, fresh, place_of
from rootcellar.cache.node import Flight, Node
from rootcellar.cache.settings import Settings
from rootcellar.cache.shelf import Shelf
from rootcellar.cache.slots import Pages
from rootcellar.cache.tree import Tree


class Desk:
    """The leases of one cache, and what their verbs need at hand: the tree, the page tables, the device's shelves."""

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

    def places(self) -> Iterator[Node]:
        """The node of every live hold, as often as it is held."""
        for lease in self.holders():
            yield lease.node
        for flight in self.traffic.flights.values():
            if flight.held and flight.node is not None:
                yield flight.node

    def holders(self) -> Iterator[Lease]:
        """Live leases, pins of prefixes and what peers may fetch."""
        yield from self.leases.values()
        yield from self.pins.values()
        yield from self.offers.values()

    def busy(self) -> tuple[int, int]:
        """Live leases, and copies under way: what a tier must not be emptied under."""
        return len(self.leases), len(self.traffic.flights) + len(self.offers)

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


def must_be_open(desk: Desk, *leases: Lease) -> None:
    """Raises ``RequestError`` for a lease that is closed, or of another cache."""
    for lease in leases:
        if desk.leases.get(lease.row) is not lease:
            raise words.closed(repr(lease))


# ---- open ---------------------------------------------------------------------------------------------------------


def open_lease(desk: Desk, hit: Hit, tier: Tier, priority: int, room: Mapping[str, int] | None) -> Lease | None:
    """Pin what the rule needs at the hit's boundary, plan to load what the device lacks, and give the request a row.

    None, and nothing planned, when a row is lacking, or room for that and for ``room`` more tokens of each paged kind.
    """
    tree, tables = desk.tree, desk.tables
    if not desk.free_rows:
        return None
    if len(hit.key) > desk.given.max_length:
        raise words.key_too_long(len(hit.key), desk.given.max_length)
    hit = fresh(tree, hit)
    boundary = desk.boundary(hit, tier)
    if tier > Tier.HOST and not fits(_staged(desk, hit, boundary // tree.page_size)):
        tier = Tier.HOST
        boundary = desk.boundary(hit, tier)
    if room is not None and not _fits_beside(desk, hit, boundary // tree.page_size, room):
        return None
    node = place_of(tree, hit, boundary // tree.page_size)
    lease = Lease(0, desk.serial + 1, node, hit.key.namespace, boundary, priority)
    pin_place(desk, lease)
    if not _load(desk, lease):
        unpin_place(desk, lease)
        prune(tree, lease.node)
        # What is nearer can still be had when only the copies do not fit together.
        if boundary == hit.length or (room is not None and tier <= Tier.HOST):
            return None
        return open_lease(desk, hit, Tier.HOST if tier > Tier.HOST else Tier.DEVICE, priority, room)
    tree.tick += 1
    tree.use(node, lease.starts)
    desk.serial += 1
    lease.row = desk.free_rows.pop()
    desk.leases[lease.row] = lease
    fill_rows(desk, lease)
    for shelf in desk.states:
        tables.by_kind[shelf.kind_index][lease.row, 1] = shelf.take(1)[0]
    node.count_hit(priority)
    if tree.shadow is not None and desk.given.reuse:
        tree.shadow.advance(len(hit.key))
        lease.trail = (0, mix(crc32(hit.key.namespace.encode("utf-8", "surrogatepass"))), -1)
        _observe(desk, lease, hit.key, 0, boundary // tree.page_size)
    return lease


def _fits_beside(desk: Desk, hit: Hit, pages: int, room: Mapping[str, int]) -> bool:
    """Whether a fresh hit can be opened at boundary ``pages`` and ``room`` more of each paged kind then be grown.

    It is counted, not tried: a request that has to wait for room leaves no trace, not even an edge that was split.
    """
    tree = desk.tree
    needs: list[tuple[Shelf, int]] = []
    for shelf in desk.paged + desk.states:
        k = shelf.kind_index
        start = desk.start_page(k, pages * tree.page_size)
        count = 1 if shelf.kind.rule == "recurrent" else -(-room[shelf.kind.name] // tree.page_size)
        for node in hit.path:
            first, end = max(start, node.start), min(pages, node.end)
            if first >= end:
                continue
            entry = node.entries[shelf.index]
            held = node.start + entry.lo if entry is not None else end
            if first < held and not flying_to(node, k, Tier.DEVICE):
                count += min(held, end) - first  # to be loaded
            if entry is not None:
                count += max(0, min(held + entry.evictable, end) - max(held, first))  # may leave now, and not then
        needs.append((shelf, count))
    return fits(needs)


def _staged(desk: Desk, hit: Hit, pages: int) -> list[tuple[Shelf, int]]:
    """What HOST must have room for so that a fresh hit can be opened at boundary ``pages``, by shelf.

    What only STORAGE has passes through it, and what HOST holds on the way may leave now, and not then.
    """
    tree = desk.tree
    needs: list[tuple[Shelf, int]] = []
    for shelf in desk.paged + desk.states:
        k = shelf.kind_index
        host, storage = tree.by_tier[Tier.HOST][k], tree.by_tier[Tier.STORAGE][k]
        if host is None or storage is None:
            continue
        start = desk.start_page(k, pages * tree.page_size)
        passing = staying = 0
        for node in hit.path:
            first, end = max(start, node.start), min(pages, node.end)
            if first >= end:
                continue
            here, near, far = (node.entries[s.index] for s in (shelf, host, storage))
            held = node.start + here.lo if here is not None else end
            if near is not None:
                staying += near.evictable
                if node.start + near.lo <= first:
                    continue
            if first < held and far is not None and node.start + far.lo <= first:
                known = flying_to(node, k, Tier.DEVICE) or flying_to(node, k, Tier.HOST)
                passing += 0 if known else min(held, end) - first
        if passing:
            needs.append((host, passing + staying))
    return needs


def pin_place(desk: Desk, lease: Lease) -> None:
    """Hold a lease's place and pin what resuming there needs."""
    tree = desk.tree
    lease.starts = [desk.start_page(k, lease.cached) for k in range(len(tree.kinds))]
    lease.sources = [None] * len(tree.kinds)
    tree.hold(lease.node)
    _pin_windows(desk, lease, 1)
    _pin_sources(desk, lease, lease.node)


def unpin_place(desk: Desk, lease: Lease) -> None:
    """Undo :func:`pin_place`, wherever the place is by now."""
    _pin_windows(desk, lease, -1)
    _pin_sources(desk, lease, None)
    desk.tree.release(lease.node)


def _load(desk: Desk, lease: Lease) -> bool:
    """Make room for the copies and states a new lease needs, and plan the copies. False: no room, nothing planned."""
    tree, traffic = desk.tree, desk.traffic
    needs: list[tuple[Shelf, int]] = []
    wanted: list[tuple[Shelf, list[tuple[Node, int]]]] = []
    for shelf in desk.paged + desk.states:
        start = lease.starts[shelf.kind_index]
        lacking = missing(tree, lease.node, shelf.kind_index, start, Tier.DEVICE) if lease.cached else []
        pages = sum(node.end - first for node, first in lacking if not flying_to(node, shelf.kind_index, Tier.DEVICE))
        needs.append((shelf, pages + (shelf.kind.rule == "recurrent")))
        wanted.append((shelf, lacking))
    if not make_room_for(tree, needs):
        return False
    plans: list[tuple[Shelf, Node, int, Shelf | None]] = []
    flights: list[Flight] = []
    for shelf, lacking in wanted:
        for node, first in lacking:
            flight = flying_to(node, shelf.kind_index, Tier.DEVICE)
            source = sources(tree, node, shelf.kind_index, first, exclude=Tier.DEVICE)
            if flight.start > first if flight is not None else source is None:
                return False
            if flight is not None:
                flights.append(flight)
            else:
                plans.append((shelf, node, first, source))
    # First what HOST has, so that it stays while room is made there for what comes from STORAGE.
    plans.sort(key=lambda item: item[3] is not None and item[3].tier is Tier.STORAGE)
    serial, asked = traffic.serial, len(traffic.outbox)
    for shelf, node, first, source in plans:
        assert source is not None
        flight = fetch(tree, traffic, node, source, shelf, first)
        if flight is None:
            call_off(tree, traffic, [f for i, f in traffic.flights.items() if i > serial])
            traffic.serial = serial
            del traffic.outbox[asked:]
            return False
        flights.append(flight)
    for flight in flights:
        flight.waiters.append(lease)
        lease.waits.add(flight.id)
    return True


def fill_rows(desk: Desk, lease: Lease) -> None:
    """Write what the tree has on the device of a lease's place into its rows."""
    for shelf in desk.paged:
        _fill_row(desk, lease, shelf, lease.starts[shelf.kind_index])
    for shelf in desk.states:
        source = lease.sources[shelf.kind_index]
        entry = source.entries[shelf.index] if source is not None and source.parent is not None else None
        if entry is not None:
            desk.tables.by_kind[shelf.kind_index][lease.row, 0] = entry.pages[0]


def _fill_row(desk: Desk, lease: Lease, shelf: Shelf, start: int) -> None:
    """Write the tree's pages ``[start, place)`` of one kind into the lease's row."""
    row = desk.tables.by_kind[shelf.kind_index][lease.row]
    climb: Node | None = lease.node
    while climb is not None and climb.end > start:
        entry = climb.entries[shelf.index]
        if entry is not None:
            first = max(start, climb.start + entry.lo)
            row[first : climb.end] = entry.pages[first - climb.start - entry.lo :]
        climb = climb.parent


def _observe(desk: Desk, lease: Lease, key: Key, first: int, pages: int) -> None:
    """Tell the shadow that pages ``[first, pages)`` of a request are in the tree; put each node in its class."""
    tree, shadow = desk.tree, desk.tree.shadow
    assert shadow is not None
    strides, trail, above = lease.trail
    prefixes = shadow.hashes(trail, key.tokens[strides * shadow.stride : pages * tree.page_size])
    classes, above = shadow.observe(prefixes, above)
    lease.trail = (strides + len(prefixes), prefixes[-1] if prefixes else trail, above)
    per_stride = shadow.stride // tree.page_size
    climb = lease.node
    while classes and climb.parent is not None and climb.end > first:
        last = max(0, min(climb.end // per_stride - strides, len(classes)) - 1)
        climb.group = classes[last]
        climb.used = shadow.volume
        while last > 0 and classes[last - 1] == climb.group:
            last -= 1
        begin = (strides + last) * per_stride
        if last > 0 and climb.start < begin < climb.end:
            tree.split(climb, begin - climb.start)
        climb = climb.parent


# ---- grow ---------------------------------------------------------------------------------------------------------


def grow(desk: Desk, lease: Lease, tokens: int) -> bool:
    """Slots for ``tokens`` more tokens, for one step. False, and nothing changed, when there is no room."""
    must_be_open(desk, lease)
    if tokens < 0:
        raise words.only_grows(tokens)
    size = desk.tree.page_size
    old = -(-lease.length // size)
    new = -(-(lease.length + tokens) // size)
    if lease.length + tokens > desk.given.max_length:
        raise words.row_full(lease.length, tokens, desk.given.max_length)
    if new > old:
        if not make_room_for(desk.tree, [(shelf, new - old) for shelf in desk.paged]):
            return False
        for shelf in desk.paged:
            desk.tables.by_kind[shelf.kind_index][lease.row, old:new] = shelf.take(new - old)
    if tokens:
        _step_states(desk, lease)
    lease.length += tokens
    return True


def grow_many(desk: Desk, leases: Sequence[Lease], tokens: int | Sequence[int]) -> list[bool]:
    """:func:`grow` for each lease of a batch, in order; one allocation per kind when one token for each fits."""
    size = desk.tree.page_size
    must_be_open(desk, *leases)
    counts = [tokens] * len(leases) if isinstance(tokens, int) else [int(count) for count in tokens]
    if len(counts) != len(leases):
        raise words.uneven("numbers of tokens")
    short = [lease for lease in leases if lease.length % size == 0]
    together = (
        all(count == 1 for count in counts)
        and all(lease.length < desk.given.max_length for lease in leases)
        and len({lease.row for lease in leases}) == len(leases)
    )
    if not together or (short and not make_room_for(desk.tree, [(shelf, len(short)) for shelf in desk.paged])):
        return [grow(desk, lease, count) for lease, count in zip(leases, counts, strict=True)]
    if short:
        rows = [lease.row for lease in short]
        columns = [lease.length // size for lease in short]
        for shelf in desk.paged:
            desk.tables.by_kind[shelf.kind_index][rows, columns] = shelf.take(len(short))
    for lease in leases:
        if desk.states:
            _step_states(desk, lease)
        lease.length += 1
    return [True] * len(leases)


def _step_states(desk: Desk, lease: Lease) -> None:
    """From its second step on, a lease reads the state it wrote, and the snapshot it began from is pinned no more."""
    if lease.stepped:
        read_own_states(desk, lease)
    lease.stepped = True


def read_own_states(desk: Desk, lease: Lease) -> None:
    """Let the lease read the states it writes, and unpin the snapshots it read before."""
    for shelf in desk.states:
        row = desk.tables.by_kind[shelf.kind_index][lease.row]
        row[0] = row[1]
    _pin_sources(desk, lease, None)


def _pin_sources(desk: Desk, lease: Lease, node: Node | None) -> None:
    """Pin the snapshots at a node's end (None: at none) in place of those the lease has pinned."""
    for shelf in desk.states:
        k = shelf.kind_index
        old = lease.sources[k]
        if node is not None and node.parent is not None:
            desk.tree.pin(node, k, node.end - 1, 1)
        if old is not None and old.parent is not None:
            desk.tree.pin(old, k, old.end - 1, -1)
        lease.sources[k] = node


def _pin_windows(desk: Desk, lease: Lease, count: int) -> None:
    """Pin (1) or unpin (-1) what the lease's place needs of each window and chunk."""
    for shelf in desk.windows:
        desk.tree.pin(lease.node, shelf.kind_index, lease.starts[shelf.kind_index], count)


# ---- commit -------------------------------------------------------------------------------------------------------


def commit(desk: Desk, lease: Lease, key: Key, snapshot: bool) -> None:
    """Make the whole pages of ``key`` shareable, and release what is out of the rule's reach."""
    must_be_open(desk, lease)
    tree = desk.tree
    size = tree.page_size
    if len(key) > lease.length or key.namespace != lease.namespace:
        raise words.commit_too_long(len(key), key.namespace, lease.length, lease.namespace)
    if desk.given.reuse:
        _pin_windows(desk, lease, -1)
        done, pages = lease.committed // size, len(key) // size
        if pages > done:
            place = _insert(desk, lease, key, done, pages)
            if place is not lease.node:
                tree.hold(place)
                if desk.given.write_after >= 0:
                    write_through(tree, desk.traffic, lease.node, desk.given.write_after)
                tree.release(lease.node)
                lease.node = place
            lease.committed = pages * size
            if tree.shadow is not None:
                _observe(desk, lease, key, done, pages)
            if desk.given.digests:
                page_digests(tree.naming, lease.node)
    for shelf in desk.windows:
        _release_passed(desk, lease, shelf, len(key))
    if desk.given.reuse:
        _pin_windows(desk, lease, 1)
        if snapshot and len(key) == lease.length == lease.committed:
            _take_snapshot(desk, lease)


def _release_passed(desk: Desk, lease: Lease, shelf: Shelf, tokens: int) -> None:
    """Move the start of a window or chunk to what resuming at ``tokens`` needs; pages before it leave the row.

    Those in the tree are merely no longer pinned; those that the lease owns (reuse is off) are free at once.
    """
    k = shelf.kind_index
    old, start = lease.starts[k], desk.start_page(k, tokens)
    if start <= old:
        return
    row = desk.tables.by_kind[k][lease.row]
    owned = max(old, lease.committed // desk.tree.page_size)
    if owned < start:
        shelf.give(row[owned:start])
    row[old:start] = 0
    lease.starts[k] = start


def _insert(desk: Desk, lease: Lease, key: Key, page: int, pages: int) -> Node:
    """Put pages ``[page, pages)`` of the lease into the tree below its place; the node that ends there."""
    tree = desk.tree
    node = lease.node
    while page < pages:
        tokens = key.tokens[page * tree.page_size : pages * tree.page_size]
        child = node.children.get(tree.first(tokens, 0))
        if child is None:
            return _insert_rest(desk, lease, node, tokens, page, pages)
        matched = tree.common(child, tokens, pages - page)
        if matched < child.size:
            child = tree.split(child, matched)
        for shelf in desk.paged:
            _merge(desk, lease, shelf, child)
        child.ticks = [tree.tick] * len(tree.kinds)
        child.priority = max(child.priority, lease.priority)
        page += matched
        node = child
    return node


def _insert_rest(desk: Desk, lease: Lease, node: Node, tokens: NDArray[np.int64], page: int, pages: int) -> Node:
    """Lengthen the lease's own leaf, or give ``node`` a new one."""
    tree = desk.tree
    new: list[Pages] = [table[lease.row, page:pages] for table in desk.tables.by_kind]
    if node is lease.node and _may_lengthen(desk, lease, node):
        tree.extend(node, tokens, pages - page, new)
        return node
    leaf = tree.add(node, tokens, pages - page)
    leaf.owner = lease.serial
    leaf.priority = lease.priority
    for shelf in desk.paged:
        tree.attach(leaf, shelf, new[shelf.kind_index].copy(), 0)
    return leaf


def _may_lengthen(desk: Desk, lease: Lease, node: Node) -> bool:
    """Whether a leaf is this lease's alone and on the device alone, so that its edge may grow in place."""
    if node.owner != lease.serial or node.refs != 1 or node.children or node.flights:
        return False
    held = sum(entry is not None for entry in node.entries)
    return held == len(desk.paged) and all(node.entries[shelf.index] is not None for shelf in desk.paged)


def _merge(desk: Desk, lease: Lease, shelf: Shelf, node: Node) -> None:
    """Where the tree has a page, free the lease's duplicate and use that; where it has none, give it the lease's."""
    row = desk.tables.by_kind[shelf.kind_index][lease.row, node.start : node.end]
    entry = node.entries[shelf.index]
    if entry is None:
        desk.tree.attach(node, shelf, row.copy(), 0)
        return
    lo = entry.lo
    shelf.give(row[lo:])
    row[lo:] = entry.pages
    if lo:
        desk.tree.attach(node, shelf, row[:lo].copy(), 0)


def _take_snapshot(desk: Desk, lease: Lease) -> None:
    """Hand the states just written to the tree, and write elsewhere from now on; skipped when no state is free."""
    tree, node = desk.tree, lease.node
    missing = [shelf for shelf in desk.states if node.entries[shelf.index] is None]
    if not missing or not lease.stepped or node.parent is None:
        return
    read_own_states(desk, lease)
    if not make_room_for(tree, [(shelf, 1) for shelf in missing]):
        return
    for shelf in missing:
        row = desk.tables.by_kind[shelf.kind_index][lease.row]
        tree.attach(node, shelf, row[1:].copy(), node.size - 1)
        row[1] = shelf.take(1)[0]
    for shelf in desk.states:
        entry = node.entries[shelf.index]
        assert entry is not None
        desk.tables.by_kind[shelf.kind_index][lease.row, 0] = entry.pages[0]
    _pin_sources(desk, lease, node)
    lease.stepped = False


# ---- close --------------------------------------------------------------------------------------------------------


def close(desk: Desk, lease: Lease, keep: bool) -> None:
    """Give back everything the lease owns and pins; with ``keep`` false also what it alone added to the tree."""
    tree = desk.tree
    must_be_open(desk, lease)
    del desk.leases[lease.row]
    committed, pages = lease.committed // tree.page_size, -(-lease.length // tree.page_size)
    for shelf in desk.paged:
        owned = max(committed, lease.starts[shelf.kind_index])
        shelf.give(desk.tables.by_kind[shelf.kind_index][lease.row, owned:pages])
    for shelf in desk.states:
        shelf.give(desk.tables.by_kind[shelf.kind_index][lease.row, 1:])
    for table in desk.tables.by_kind:
        table[lease.row, : max(pages, 2)] = 0
    desk.free_rows.append(lease.row)
    tree.use(lease.node, lease.starts)
    if keep and desk.given.write_after >= 0:
        write_through(tree, desk.traffic, lease.node, desk.given.write_after)
    unpin_place(desk, lease)
    prune(tree, lease.node if keep else _drop_own(tree, lease))


def _drop_own(tree: Tree, lease: Lease) -> Node:
    """Throw away the nodes the lease added that nobody shares; the first node above that stays."""
    path = [lease.node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    for node in path[:-1]:
        if node.parent is None:  # it held nothing and went with the node below
            continue
        if node.owner != lease.serial or node.refs or node.children or node.hits:
            return node
        drop_subtree(tree, node)
    return path[-1]
