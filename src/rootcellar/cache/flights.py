"""Copies under way: planning them, and learning what became of them.

A flight's destination pages belong to it until it is done. One that is *held* also keeps its place in the tree and
its source. What is written down from the device is not held: its source is read before the next step, so it may be
evicted at once, and a slow or silent tier never ties up the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rootcellar.cache.digest import page_digests
from rootcellar.cache.evict import forget_entry, make_room, prune
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.match import find
from rootcellar.cache.moves import Event, Failed, Found, Lost, Move
from rootcellar.cache.node import Flight, Node, Waiter
from rootcellar.cache.shelf import Shelf
from rootcellar.cache.slots import Pages
from rootcellar.cache.tree import Tree

DOWN = ((Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.STORAGE))
"""The ways on which copies are written, to keep what nearer tiers hold."""


@dataclass(slots=True)
class Traffic:
    """Moves planned and not yet handed out, flights not yet reported, and the tiers that may be written to."""

    outbox: list[Move] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)
    serial: int = 0
    failed: int = 0
    written: set[Tier] = field(default_factory=set)


def path_nodes(flight: Flight) -> Iterator[Node]:
    """The nodes a flight covers, lowest first."""
    node = flight.node
    while node is not None and node.end > flight.start:
        yield node
        node = node.parent


# ---- plan ---------------------------------------------------------------------------------------------------------


def plan(
    tree: Tree,
    traffic: Traffic,
    node: Node,
    source: Shelf,
    target: Shelf,
    start: int,
    *,
    held: bool = True,
    after: Flight | None = None,
) -> Flight | None:
    """Plan to copy pages ``[start, node.end)`` from one shelf to another of the same kind. None: no room there.

    The source has the pages, or will have them once ``after`` is done.
    """
    traffic.serial += 1
    flight = Flight(traffic.serial, source.kind_index, source.tier, target.tier, start, np.empty(0, np.int32), held)
    flight.node, flight.after = node, after
    node.flights.append(flight)
    if held:
        tree.hold(node, far=flight.far)
    _refresh(tree, flight)
    if not make_room(tree, target.arena, node.end - start):
        _land(tree, flight)
        return None
    flight.slots = target.take(node.end - start)
    target.in_flight += len(flight.slots)
    traffic.flights[flight.id] = flight
    if after is None:
        _depart(tree, traffic, flight)
    return flight


def fetch(tree: Tree, traffic: Traffic, node: Node, source: Shelf, target: Shelf, start: int) -> Flight | None:
    """:func:`plan` towards the device, from STORAGE by way of HOST. None: no room there or on HOST."""
    if source.tier is not Tier.STORAGE:
        return plan(tree, traffic, node, source, target, start)
    host = tree.by_tier[Tier.HOST][source.kind_index]
    assert host is not None, "settings see to it"
    first = flying_to(node, source.kind_index, Tier.HOST)
    if first is None:
        first = plan(tree, traffic, node, source, host, start)
    if first is None or first.start > start:
        return None
    return plan(tree, traffic, node, host, target, start, after=first)


def _depart(tree: Tree, traffic: Traffic, flight: Flight) -> None:
    """Ask for the copy: its source is there."""
    source = tree.by_tier[flight.src][flight.kind_index]
    node = flight.node
    assert source is not None
    assert node is not None
    slots: list[Pages] = []
    for step in path_nodes(flight):
        entry = step.entries[source.index]
        assert entry is not None
        slots.append(entry.pages[max(flight.start, step.start) - step.start - entry.lo :])
    named = max(flight.src, flight.dst) >= Tier.STORAGE  # these begin at once, so nothing has split their node
    flight.after = None
    traffic.outbox.append(
        Move(
            id=flight.id,
            kind=source.kind.name,
            src=flight.src,
            dst=flight.dst,
            src_slots=np.concatenate(slots[::-1]),
            dst_slots=flight.slots,
            first=flight.start,
            digests=tuple(page_digests(tree.naming, node)[flight.start - node.start :]) if named else (),
        )
    )


def call_off(tree: Tree, traffic: Traffic, flights: list[Flight]) -> None:
    """End flights that nobody was told of, the newest first."""
    for flight in flights[::-1]:
        target = _off_the_books(tree, traffic, flight)
        _lose(flight, target)
        _land(tree, flight)


def _off_the_books(tree: Tree, traffic: Traffic, flight: Flight) -> Shelf:
    """Count a flight as ended; where it was going."""
    del traffic.flights[flight.id]
    target = tree.by_tier[flight.dst][flight.kind_index]
    assert target is not None
    target.in_flight -= len(flight.slots)
    return target


def _lose(flight: Flight, target: Shelf) -> None:
    """Free a destination that will not be filled, and lose the leases that waited for it."""
    target.give(flight.slots)
    for lease in flight.waiters:
        lease.waits.clear()
        lease.lost = True


def _followers(flight: Flight) -> list[Flight]:
    """The flights that begin when this one is done, the oldest first."""
    found = {later.id: later for node in path_nodes(flight) for later in node.flights if later.after is flight}
    return [found[ident] for ident in sorted(found)]


def _refresh(tree: Tree, flight: Flight) -> None:
    """Recount what may leave after a flight came or went."""
    for node in path_nodes(flight):
        for tier in (flight.src, flight.dst):
            shelf = tree.by_tier[tier][flight.kind_index]
            if shelf is not None and not shelf.full:
                tree.refresh(node, shelf)


def _land(tree: Tree, flight: Flight) -> None:
    """Take a flight off the tree; what became unreachable is thrown away."""
    place = flight.node
    nodes = list(path_nodes(flight))
    for node in nodes:
        node.flights.remove(flight)
    _refresh(tree, flight)
    if place is not None:
        if flight.held:
            tree.release(place, far=flight.far)
        prune(tree, place)


def sources(tree: Tree, node: Node, k: int, start: int, exclude: Tier) -> Shelf | None:
    """The nearest shelf but ``exclude`` whose entry covers the node from page ``start`` on."""
    for tier in tree.tiers:
        shelf = tree.by_tier[tier][k]
        if tier is not exclude and shelf is not None:
            entry = node.entries[shelf.index]
            if entry is not None and entry.lo <= start - node.start:
                return shelf
    return None


def flying_to(node: Node, k: int, tier: Tier) -> Flight | None:
    """A flight of kind ``k`` to ``tier`` that ends at or covers the node."""
    for flight in node.flights:
        if flight.kind_index == k and flight.dst is tier:
            return flight
    return None


def missing(tree: Tree, place: Node, k: int, start: int, tier: Tier) -> list[tuple[Node, int]]:
    """What ``tier`` lacks of kind ``k`` in pages ``[start, place.end)``, top down: ``(node, first page)`` to its end.

    A node that holds only its tail there is split, so that every piece ends where its node ends.
    """
    pieces: list[tuple[Node, int]] = []
    shelf = tree.by_tier[tier][k]
    climb: Node | None = place
    if shelf is None:
        return pieces
    recurrent = shelf.kind.rule == "recurrent"
    while climb is not None and climb.end > start:
        entry = climb.entries[shelf.index]
        first = max(start, climb.start)
        if entry is None:
            pieces.append((climb, climb.end - 1 if recurrent else first))
        elif entry.lo > first - climb.start:
            climb = tree.split(climb, entry.lo)
            pieces.append((climb, first))
        climb = climb.parent
    return pieces[::-1]


def write_through(tree: Tree, traffic: Traffic, place: Node, hits: int) -> None:
    """Plan to write down what a path's nodes need at their ends, top down, where they were hit often enough.

    From DEVICE to HOST, and what HOST has and STORAGE lacks: a copy to a slow or new store may have been left out.
    """
    path: list[Node] = []
    climb = place
    while climb.parent is not None:
        path.append(climb)
        climb = climb.parent
    for node in reversed(path):
        if node.hits >= hits:
            for src, dst in DOWN:
                _copy_down(tree, traffic, node, src, dst)


def _copy_down(tree: Tree, traffic: Traffic, node: Node, src: Tier, dst: Tier) -> None:
    """Plan to copy what resuming at the node's end needs of the node from one tier to a farther one."""
    if dst not in traffic.written:
        return
    for source, target in zip(tree.by_tier[src], tree.by_tier[dst], strict=True):
        if source is None or target is None:
            continue
        entry = node.entries[source.index]
        k = source.kind_index
        if entry is None or node.entries[target.index] is not None or flying_to(node, k, dst) is not None:
            continue
        start = max(node.start + entry.lo, node.end - tree.ranking.reach(k, node.end))
        if start < node.end:
            # The device is read before the next step: its pages need not wait for a slow tier.
            plan(tree, traffic, node, source, target, start, held=src is not Tier.DEVICE)


def spill(tree: Tree, traffic: Traffic, node: Node, shelf: Shelf) -> None:
    """Write-back: an entry is about to leave DEVICE; plan to save it to HOST unless a copy is there or on its way."""
    target = tree.by_tier[Tier.HOST][shelf.kind_index]
    if shelf.tier is not Tier.DEVICE or Tier.HOST not in traffic.written or target is None:
        return
    if node.entries[target.index] is not None:
        return
    entry = node.entries[shelf.index]
    assert entry is not None
    if flying_to(node, shelf.kind_index, Tier.HOST) is not None:
        return
    # Room in an arena is made by whichever kind may leave: nothing that this place in the tree needs may.
    tree.hold(node)
    if target.arena.room >= len(entry.pages):
        plan(tree, traffic, node, shelf, target, node.start + entry.lo, held=False)
    tree.release(node)


# ---- learn --------------------------------------------------------------------------------------------------------


def learn(tree: Tree, traffic: Traffic, event: Event) -> list[Waiter]:
    """Take in what the movers saw. Returns the leases that waited for a move now done, to have their rows filled."""
    if isinstance(event, Found):
        _found(tree, event)
        return []
    if isinstance(event, Lost):
        _lost(tree, event)
        return []
    flight = traffic.flights.get(event.move)
    if flight is None or flight.after is not None:
        return []
    target = _off_the_books(tree, traffic, flight)
    if isinstance(event, Failed):
        traffic.failed += 1
        _fail(tree, traffic, flight, target)
        return []
    later = _followers(flight)
    _done(tree, flight, target)
    for follower in later:
        _depart(tree, traffic, follower)
    if flight.dst is Tier.HOST and flight.node is not None and flight.node.parent is not None:
        for node in list(path_nodes(flight))[::-1]:
            _copy_down(tree, traffic, node, Tier.HOST, Tier.STORAGE)
    return flight.waiters


def _done(tree: Tree, flight: Flight, target: Shelf) -> None:
    """Hand the destination's pages to the nodes; where they have some by now, the copies are duplicates and freed."""
    end = flight.start
    for node in list(path_nodes(flight)):
        end = max(end, node.end)
        first = max(flight.start, node.start)
        _attach_missing(tree, node, target, flight.slots[first - flight.start : node.end - flight.start], first)
    target.give(flight.slots[end - flight.start :])
    for lease in flight.waiters:
        lease.waits.discard(flight.id)
    _land(tree, flight)


def _attach_missing(tree: Tree, node: Node, shelf: Shelf, pages: Pages, first: int) -> None:
    """Give a node pages from absolute page ``first`` to its end, as far as its entry lacks them; free the others."""
    entry = node.entries[shelf.index]
    lo = first - node.start
    wanted = len(pages) if entry is None else max(0, entry.lo - lo)
    shelf.give(pages[wanted:])
    if wanted:
        tree.attach(node, shelf, pages[:wanted], lo)


def _fail(tree: Tree, traffic: Traffic, flight: Flight, target: Shelf) -> None:
    """Free the destination, lose the leases that waited, and forget a farther source that could not be read."""
    _lose(flight, target)
    call_off(tree, traffic, _followers(flight))
    nodes = list(path_nodes(flight))
    source = tree.by_tier[flight.src][flight.kind_index]
    if flight.held and flight.src > flight.dst and source is not None:
        for node in nodes:
            others = any(f is not flight and f.blocks(flight.kind_index, flight.src) for f in node.flights)
            if not others:
                forget_entry(tree, source, node)
    _land(tree, flight)


def _kinds(tree: Tree, name: str) -> list[int]:
    return [k for k, kind in enumerate(tree.kinds) if name in ("", kind.name)]


def _found(tree: Tree, event: Found) -> None:
    """Note what a store or a peer holds of a key, as far as there is room to note it."""
    pages = len(event.key) // tree.page_size
    if not pages:
        return
    wanted: list[tuple[Shelf, int]] = []
    for k in _kinds(tree, event.kind):
        shelf = tree.by_tier[event.tier][k]
        if shelf is None:
            continue
        first = tree.kinds[k].start(pages * tree.page_size) // tree.page_size
        if event.start is not None and shelf.kind.rule != "recurrent":
            whole = -(-event.start // tree.page_size)
            first = whole if event.kind else min(first, whole)
        wanted.append((shelf, first))
    place = _lay_path(tree, event.key, pages)
    tree.hold(place)
    for shelf, first in wanted:
        for node, start in missing(tree, place, shelf.kind_index, first, event.tier):
            if shelf.full and start > node.start:
                continue
            if flying_to(node, shelf.kind_index, event.tier) or not make_room(tree, shelf.arena, node.end - start):
                break
            tree.attach(node, shelf, shelf.take(node.end - start), start - node.start)
    tree.release(place)
    if event.kind and wanted and wanted[0][0].full:
        tree.discard(place)  # not what another such kind is yet to be found for
    else:
        prune(tree, place)


def _lay_path(tree: Tree, key: Key, pages: int) -> Node:
    """The node that ends at page ``pages`` of a key, made (holding nothing) as far as the tree lacks it."""
    hit = find(tree, key)
    known = hit.branch // tree.page_size
    node = tree.root(key.namespace)
    for step in hit.path:
        if step.start >= min(known, pages):
            break
        node = step if step.end <= min(known, pages) else tree.split(step, min(known, pages) - step.start)
    if known < pages:
        node = tree.add(node, key.tokens[known * tree.page_size : pages * tree.page_size], pages - known)
    return node


def _lost(tree: Tree, event: Lost) -> None:
    """Forget what a tier no longer holds; an entry that is being read or written is left to its flight."""
    first = event.start // tree.page_size
    for node in reversed(find(tree, event.key).path):
        if node.end <= first or node.start * tree.page_size >= len(event.key):
            continue
        for k in _kinds(tree, event.kind):
            shelf = tree.by_tier[event.tier][k]
            if shelf is None or any(flight.blocks(k, event.tier) for flight in node.flights):
                continue
            if shelf.full and node.start < first and node.entries[shelf.index] is not None:
                tree.split(node, first - node.start)
            forget_entry(tree, shelf, node)
        prune(tree, node)
