"""What an operator asks of the cache: pin a prefix, drop a namespace, save or send, prefetch, empty a tier."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

from rootcellar.cache import words
from rootcellar.cache.evict import drop_subtree, forget_entry, prune
from rootcellar.cache.evict import make_room as make_room_in
from rootcellar.cache.flights import flying_to, missing, plan, sources
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.lease import Lease
from rootcellar.cache.match import Hit, find, fresh, place_of
from rootcellar.cache.node import Node
from rootcellar.cache.verbs import Desk, pin_place, unpin_place

FOREVER = 1 << 62  # ticks
PrefetchPolicy = Literal["best_effort", "wait_complete", "timeout"]


# ---- pins ---------------------------------------------------------------------------------------------------------


def pin(desk: Desk, key: Key, ttl: int) -> int:
    """Keep what is on the device of ``key`` for ``ttl`` ticks. Returns how many tokens that is."""
    tree = desk.tree
    hit = find(tree, key)
    if not hit.length:
        return 0
    desk.serial += 1
    lease = Lease(0, desk.serial, place_of(tree, hit, hit.length // tree.page_size), key.namespace, hit.length, 0)
    pin_place(desk, lease)
    desk.pins[lease.serial] = lease
    heappush(desk.expiries, (tree.tick + min(ttl, FOREVER), lease.serial))
    return hit.length


def unpin(desk: Desk, key: Key) -> int:
    """Undo every pin of a prefix of ``key``. Returns how many pins there were."""
    path = {id(node) for node in find(desk.tree, key).path}
    gone = [serial for serial, lease in desk.pins.items() if id(lease.node) in path]
    for serial in gone:
        _drop_pin(desk, serial)
    return len(gone)


def expire(desk: Desk) -> None:
    """Undo the pins whose time has come."""
    while desk.expiries and desk.expiries[0][0] <= desk.tree.tick:
        _, serial = heappop(desk.expiries)
        if serial in desk.pins:
            _drop_pin(desk, serial)


def _drop_pin(desk: Desk, serial: int) -> None:
    lease = desk.pins.pop(serial)
    unpin_place(desk, lease)
    prune(desk.tree, lease.node)


# ---- namespaces and tiers -----------------------------------------------------------------------------------------


def drop_namespace(desk: Desk, namespace: str) -> int:
    """Forget a namespace: nothing in it is a hit again. Returns the tokens that live leases keep until they close."""
    tree = desk.tree
    root = tree.roots.pop(namespace, None)
    if root is None:
        return 0
    for serial in [s for s, lease in desk.pins.items() if lease.namespace == namespace]:
        _drop_pin(desk, serial)
    tree.detached.append(root)
    held = 0
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        if node.refs == 0:
            drop_subtree(tree, node)
        else:
            held += node.size * tree.page_size
            stack.extend(node.children.values())
    tree.version += 1
    return held


def forget_tier(desk: Desk, tier: Tier) -> None:
    """Forget all that a tier holds (its memory is about to go). Raises ``CacheBusy`` while anything is in use."""
    if desk.leases or desk.traffic.flights:
        raise words.busy(f"{tier.name} cannot be emptied", len(desk.leases), len(desk.traffic.flights))
    tree = desk.tree
    for serial in list(desk.pins):
        _drop_pin(desk, serial)
    stack = [child for root in tree.roots.values() for child in root.children.values()]
    order: list[Node] = []
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(node.children.values())
    for node in reversed(order):
        for shelf in tree.by_tier[tier]:
            if shelf is not None:
                forget_entry(tree, shelf, node)
        prune(tree, node)


def make_room(desk: Desk, kind: str, tokens: int, tier: Tier) -> bool:
    """Evict until ``tokens`` of a kind are free on a tier."""
    for shelf in desk.tree.shelves:
        if shelf.kind.name == kind and shelf.tier is tier:
            size = 1 if kind in (state.kind.name for state in desk.states) else desk.tree.page_size
            return make_room_in(desk.tree, shelf.arena, -(-tokens // size))
    raise KeyError(f"{kind}: no such kind on this tier")


# ---- copies on request --------------------------------------------------------------------------------------------


def copy(desk: Desk, hit: Hit, boundary: int, dst: Tier) -> set[int]:
    """Plan to copy to ``dst`` what resuming at ``boundary`` tokens needs and ``dst`` lacks, from the nearest tier.

    Returns the ids of the moves, those under way already included; where there is no room the rest is left out.
    """
    tree, traffic = desk.tree, desk.traffic
    ids: set[int] = set()
    if not boundary:
        return ids
    hit = fresh(tree, hit)
    boundary = min(boundary, max(hit.reaches))
    place = place_of(tree, hit, boundary // tree.page_size)
    tree.hold(place)
    for k in range(len(tree.kinds)):
        start = tree.kinds[k].start(boundary) // tree.page_size
        target = tree.by_tier[dst][k]
        for node, first in missing(tree, place, k, start, dst):
            flight = flying_to(node, k, dst)
            if flight is None:
                source = sources(tree, node, k, first, exclude=dst)
                if source is None or target is None:
                    break
                flight = plan(tree, traffic, node, source, target, first)
                if flight is None:
                    break
            ids.add(flight.id)
    tree.release(place)
    prune(tree, place)
    return ids


def save(desk: Desk, dst: Tier) -> int:
    """Plan to copy everything on the device to ``dst`` (before the device's memory is dropped). Returns the moves."""
    tree = desk.tree
    planned = 0
    nodes = [child for root in tree.roots.values() for child in root.children.values()]
    for node in nodes:  # parents first: the list grows as it is read
        nodes.extend(node.children.values())
        for source, target in zip(tree.by_tier[Tier.DEVICE], tree.by_tier[dst], strict=True):
            if source is None or target is None or node.entries[target.index] is not None:
                continue
            entry = node.entries[source.index]
            if entry is not None and flying_to(node, source.kind_index, dst) is None:
                planned += plan(tree, desk.traffic, node, source, target, node.start + entry.lo) is not None
    return planned


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Copies from farther tiers to HOST that a waiting request would like to see done; ``tokens`` is their reach."""

    moves: frozenset[int]
    tokens: int


def prefetch(desk: Desk, hit: Hit, tier: Tier) -> Prefetch | None:
    """Plan to bring what ``tier`` would add to a hit to HOST. None when it adds less than ``min_load`` asks for."""
    reach = desk.boundary(hit, tier)
    if reach <= hit.reach(Tier.HOST):
        return None
    return Prefetch(frozenset(copy(desk, hit, reach, Tier.HOST)), reach)


def prefetch_verdict(policy: PrefetchPolicy, pending: int, waited: float, timeout: float) -> Literal["wait", "go"]:
    """Whether a request waits on for its prefetch, under SGLang's three policies.

    ``pending`` moves are not yet reported; ``waited`` and ``timeout`` are in the caller's unit of time. ``best_effort``
    never waits, ``wait_complete`` waits for all, ``timeout`` until all are there or the time is up.
    """
    if policy == "best_effort" or pending == 0:
        return "go"
    return "go" if policy == "timeout" and waited >= timeout else "wait"
