"""The invariants, recounted from nothing: every slot has exactly one owner, or the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from rootcellar.cache.cache import Cache
from rootcellar.cache.digest import chain, seed_digest
from rootcellar.cache.kind import Tier
from rootcellar.cache.lease import Lease
from rootcellar.cache.node import Entry, Node
from rootcellar.cache.shelf import Arena, Shelf
from rootcellar.cache.slots import Pages
from rootcellar.cache.tree import Tree
from rootcellar.errors import CacheBroken


def walk(tree: Tree) -> Iterator[Node]:
    """Every node but the roots, parents first."""
    stack = [child for root in [*tree.roots.values(), *tree.detached] for child in root.children.values()]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def check(cache: Cache) -> None:
    """Recount everything in O(nodes + pages), and hash the way to each node that has digests.

    Raises ``CacheBroken`` with the first thing that does not add up.
    """
    nodes = list(walk(cache.tree))
    if len(nodes) != cache.tree.nodes:
        raise CacheBroken(f"{len(nodes)} nodes in the tree, {cache.tree.nodes} counted")
    for node in nodes:
        _check_node(cache.tree, node)
        _check_digests(cache.tree, node)
    if {node for node in nodes if any(node.turns)} != set(cache.tree.queued):
        raise CacheBroken("the nodes that have a turn are not those that are known to")
    _check_holds(cache, nodes)
    for shelf in cache.tree.shelves:
        _check_counts(cache, shelf, nodes)
    for arena in cache.tree.arenas:
        _check_slots(cache, arena, nodes)
    for lease in cache.leases.values():
        _check_lease(cache, lease)
    for root in cache.tree.detached:
        if any(not child.held for child in root.children.values()):
            raise CacheBroken(f"the dropped namespace {root.namespace!r} keeps what nobody holds")
    for root in [*cache.tree.roots.values(), *cache.tree.detached]:
        if not root.held and not root.children:
            raise CacheBroken(f"namespace {root.namespace!r} is empty and was not forgotten")
    for table in cache.tables.by_kind:
        if table[0].any():
            raise CacheBroken("row 0 of a page table, the padding row, is not zero")
    if not cache.given.reuse and nodes:
        raise CacheBroken("reuse is off and the tree has nodes")


def _name(node: Node) -> str:
    return f"node {node.id} (pages {node.start} to {node.end})"


def _check_node(tree: Tree, node: Node) -> None:
    parent = node.parent
    if parent is None or parent.end != node.start:
        raise CacheBroken(f"{_name(node)} does not begin where its parent ends")
    if parent.children.get(tree.first(node.tokens, 0)) is not node:
        raise CacheBroken(f"{_name(node)} is not filed under its first page")
    if len(node.tokens) != node.size * tree.page_size:
        raise CacheBroken(f"{_name(node)}: {len(node.tokens)} tokens on the edge")
    empty = all(entry is None for entry in node.entries)
    if empty and not (node.children or node.flights or node.held):
        raise CacheBroken(f"{_name(node)} is a leaf, holds nothing and is kept")
    for shelf in tree.shelves:
        kids = sum(child.entries[shelf.index] is not None for child in node.children.values())
        if kids != node.kids[shelf.index]:
            raise CacheBroken(f"{_name(node)}: {kids} children on {_shelf(shelf)}, not {node.kids}")
        entry = node.entries[shelf.index]
        if entry is not None:
            _check_shape(node, shelf, entry)


def _check_digests(tree: Tree, node: Node) -> None:
    """Those that a node has are what one gets by hashing its whole way at once."""
    if not node.digests:
        return
    way = [node.tokens]
    root = node
    while root.parent is not None and root.parent.parent is not None:
        root = root.parent
        way.append(root.tokens)
    assert root.parent is not None
    first = seed_digest(tree.naming.fingerprint, root.parent.namespace, tree.page_size)
    names = chain(first, np.concatenate(way[::-1]), tree.page_size)
    if node.digests != names[node.start : node.start + len(node.digests)]:
        raise CacheBroken(f"{_name(node)} is not called by its digests")


def _check_shape(node: Node, shelf: Shelf, entry: Entry) -> None:
    good = entry.lo + len(entry.pages) == node.size and len(entry.pages) > 0
    if shelf.full:
        good = good and entry.lo == 0
    if shelf.kind.rule == "recurrent":
        good = good and len(entry.pages) == 1
    if not good:
        raise CacheBroken(
            f"{_name(node)} holds pages {entry.lo}+{len(entry.pages)} on {_shelf(shelf)}: not a tail of the edge"
        )


def _shelf(shelf: Shelf) -> str:
    return f"{shelf.kind.name}/{shelf.tier.name}"


def _check_holds(cache: Cache, nodes: list[Node]) -> None:
    """Invariant 2: holds and pins are the sum of what live leases and moves need."""
    tree = cache.tree
    near: Counter[int] = Counter()
    far: Counter[int] = Counter()
    pins: Counter[tuple[int, int, int]] = Counter()  # node, kind, first page; -1: from the node's start
    for node, apart in cache.places():
        (far if apart else near)[node.id] += 1
    for lease in cache.holders():
        for k in tree.windows:
            recurrent = tree.kinds[k].rule == "recurrent"
            place = lease.sources[k] if recurrent else lease.node
            if place is None or place.parent is None or not cache.given.reuse:
                continue
            start = place.end - 1 if recurrent else lease.starts[k]
            climb: Node | None = place
            while climb is not None and start < climb.end:
                pins[climb.id, k, max(start, climb.start) if start > climb.start else -1] += 1
                climb = climb.parent
    for node in [*nodes, *tree.roots.values(), *tree.detached]:
        for counted, places, held in (
            (node.refs, near, sum(child.refs > 0 for child in node.children.values())),
            (node.far, far, sum(child.far > 0 for child in node.children.values())),
        ):
            if counted != places[node.id] + held:
                raise CacheBroken(f"{_name(node)}: held {counted} times, {places[node.id] + held} accounted for")
        for k in tree.windows:
            if not (
                node.covers[k] == pins.pop((node.id, k, -1), 0)
                and all(count == pins.pop((node.id, k, p), 0) for p, count in node.starts[k].items())
            ):
                raise CacheBroken(
                    f"{_name(node)}: pins of {tree.kinds[k].name}, {node.covers[k]} and {node.starts[k]}, "
                    f"are not those of the leases"
                )
    if pins:
        raise CacheBroken(f"pins by (node, kind, page) that no node has: {dict(pins)}")


def _check_slots(cache: Cache, arena: Arena, nodes: list[Node]) -> None:
    """Invariant 1: free + tree + leases + moves in flight = all, and no slot twice."""
    shelves = [shelf for shelf in cache.tree.shelves if shelf.arena is arena]
    groups = [arena.slots.free_list()]
    for shelf in shelves:
        taken = _taken(cache, shelf, nodes)
        if sum(map(len, taken)) != shelf.used:
            raise CacheBroken(f"{_shelf(shelf)}: {shelf.used} pages counted as used, {sum(map(len, taken))} found")
        groups += taken
    if arena.evictable != sum(shelf.evictable for shelf in shelves):
        raise CacheBroken(f"{arena.name}: {arena.evictable} evictable, not the sum over its kinds")
    owned = np.bincount(np.concatenate(groups), minlength=arena.slots.pages + 1)
    wrong = np.flatnonzero(owned[1:] != 1) + 1
    if len(wrong) or owned[0] or len(owned) != arena.slots.pages + 1:
        raise CacheBroken(
            f"{arena.name}: pages {wrong[:8].tolist()} have {owned[wrong[:8]].tolist()} owners, page 0 has {owned[0]}"
        )


def _taken(cache: Cache, shelf: Shelf, nodes: list[Node]) -> list[Pages]:
    """The pages that a shelf's owners have: the tree, leases, and moves in flight."""
    k = shelf.kind_index
    groups = [entry.pages for node in nodes if (entry := node.entries[shelf.index]) is not None]
    if shelf.tier is Tier.DEVICE:
        table = cache.tables.by_kind[k]
        for lease in cache.leases.values():
            if shelf.kind.rule == "recurrent":
                groups.append(table[lease.row, 1:])
            else:
                begin = max(lease.committed // cache.tree.page_size, lease.starts[k])
                groups.append(table[lease.row, begin : -(-lease.length // cache.tree.page_size)])
    flying = cache.in_flight(shelf)
    if sum(map(len, flying)) != shelf.in_flight:
        raise CacheBroken(f"{_shelf(shelf)}: {shelf.in_flight} pages counted in flight")
    return groups + flying


def _check_counts(cache: Cache, shelf: Shelf, nodes: list[Node]) -> None:
    cached = evictable = entries = 0
    for node in nodes:
        entry = node.entries[shelf.index]
        if entry is None:
            continue
        entries += 1
        cached += len(entry.pages)
        evictable += entry.evictable
        if shelf.full:
            may = 0 if node.refs or (node.far and shelf.tier is not Tier.DEVICE) else len(entry.pages)
        else:
            may = cache.tree.unpinned(node, shelf, entry)
        if entry.evictable != may:
            raise CacheBroken(f"{_name(node)} on {_shelf(shelf)}: {entry.evictable} evictable, {may} unpinned")
        ready = may and not (shelf.full and node.kids[shelf.index])
        if ready and entry.item is None:
            raise CacheBroken(f"{_name(node)} may leave {_shelf(shelf)} and is not filed")
    counted = (shelf.entries, shelf.cached, shelf.evictable)
    if counted != (entries, cached, evictable):
        raise CacheBroken(f"{_shelf(shelf)}: counts {counted}, found {entries, cached, evictable}")


def _check_lease(cache: Cache, lease: Lease) -> None:
    """Invariant 3: a ready lease has on the device all that the rule asks for, in its row."""
    size = cache.tree.page_size
    place = lease.node
    if cache.given.reuse and place.end * size != lease.committed:
        raise CacheBroken(f"{lease!r} committed {lease.committed} tokens, its place ends at {place.end * size}")
    pages = -(-lease.length // size)
    for shelf in cache.paged:
        k = shelf.kind_index
        row = cache.tables.by_kind[k][lease.row]
        start = lease.starts[k]
        if start > cache.start_page(k, lease.length):
            raise CacheBroken(
                f"{lease!r}: {shelf.kind.name} was released from page {start} on, the rule needs it earlier"
            )
        if row[:start].any():
            raise CacheBroken(f"{lease!r}: released pages are in the row")
        if row[pages:].any():
            raise CacheBroken(f"{lease!r}: pages beyond its length are in the row")
        if lease.ready and not row[start:pages].all():
            raise CacheBroken(f"{lease!r}: {shelf.kind.name} lacks pages that the rule needs")
        climb: Node | None = place
        while cache.given.reuse and climb is not None and climb.end > start:
            entry = climb.entries[shelf.index]
            first = max(start, climb.start)
            if lease.ready and not (
                entry is not None
                and entry.lo <= first - climb.start
                and np.array_equal(entry.pages[first - climb.start - entry.lo :], row[first : climb.end])
            ):
                raise CacheBroken(f"{lease!r}: its row of {shelf.kind.name} differs from {_name(climb)}")
            climb = climb.parent
    for shelf in cache.states:
        read, write = cache.tables.by_kind[shelf.kind_index][lease.row]
        if write <= 0:
            raise CacheBroken(f"{lease!r} has no state of {shelf.kind.name} to write")
        if not lease.ready:
            continue
        source = lease.sources[shelf.kind_index]
        if source is not None and source.parent is not None:
            entry = source.entries[shelf.index]
            if entry is None or entry.pages[0] != read:
                raise CacheBroken(f"{lease!r} reads a state that is not {_name(source)}'s")
        elif read not in (0, write):
            raise CacheBroken(f"{lease!r} reads state {read} of {shelf.kind.name}, which it does not pin")
