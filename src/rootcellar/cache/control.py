"""What is asked of the cache beside the life of a lease: pins, namespaces, tiers, stores and peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import words
from rootcellar.cache.cache import Cache, pin_place, unpin_place
from rootcellar.cache.digest import Naming, page_digests, seed_digest
from rootcellar.cache.evict import drop_subtree, forget_entry, prune
from rootcellar.cache.evict import make_room as make_room_in
from rootcellar.cache.flights import DOWN, flying_to, missing, plan, sources, write_through
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.lease import Lease
from rootcellar.cache.match import Hit, find, fresh, place_of
from rootcellar.cache.moves import Manifest, Part, Question
from rootcellar.cache.node import Node
from rootcellar.cache.order import LATEST, NEVER
from rootcellar.cache.slots import Pages
from rootcellar.cache.tree import Tree

Chain = Callable[[bytes, NDArray[np.int64], int], list[bytes]]
FOREVER = 1 << 62  # ticks


# ---- pins ---------------------------------------------------------------------------------------------------------


def pin(cache: Cache, key: Key, ttl: int) -> int:
    """Keep what is on the device of ``key`` for ``ttl`` ticks. Returns how many tokens that is."""
    tree = cache.tree
    hit = find(tree, key)
    if not hit.length:
        return 0
    cache.serial += 1
    lease = Lease(0, cache.serial, place_of(tree, hit, hit.length // tree.page_size), key.namespace, hit.length, 0)
    pin_place(cache, lease)
    cache.pins[lease.serial] = lease
    heappush(cache.expiries, (tree.tick + min(ttl, FOREVER), lease.serial))
    return hit.length


def unpin(cache: Cache, key: Key) -> int:
    """Undo every pin of a prefix of ``key``. Returns how many pins there were."""
    path = {id(node) for node in find(cache.tree, key).path}
    gone = [serial for serial, lease in cache.pins.items() if id(lease.node) in path]
    for serial in gone:
        _drop_pin(cache, serial)
    return len(gone)


def expire(cache: Cache) -> None:
    """Undo the pins whose time has come."""
    while cache.expiries and cache.expiries[0][0] <= cache.tree.tick:
        _, serial = heappop(cache.expiries)
        if serial in cache.pins:
            _drop_pin(cache, serial)


def _drop_pin(cache: Cache, serial: int) -> None:
    lease = cache.pins.pop(serial)
    unpin_place(cache, lease)
    prune(cache.tree, lease.node)


# ---- what is said of the future --------------------------------------------------------------------------------------


def expect(cache: Cache, key: Key, when: int) -> int:
    """Note when what is cached of ``key`` is wanted again. Returns how many tokens of it that is about."""
    tree = cache.tree
    hit = find(tree, key)
    due = max(NEVER, min(when, LATEST))
    if due == 0:
        for node in reversed(hit.path):
            _forget_due(tree, node)
    if due == 0 or not hit.length:
        return hit.length
    place = place_of(tree, hit, hit.length // tree.page_size)
    if due == NEVER:
        return _never(tree, place)
    for k in range(len(tree.kinds)):
        start = cache.start_page(k, hit.length)
        climb = place
        while climb.parent is not None and climb.end > start:
            tree.expect(climb, k, min(due, climb.dues[k]) if climb.dues[k] > 0 else due)
            climb = climb.parent
    return hit.length


def _forget_due(tree: Tree, node: Node) -> None:
    """Nobody said when a node is wanted, but for what is known of full attention below, which needs all above it."""
    for k, kind in enumerate(tree.kinds):
        below = [due for child in node.children.values() if (due := child.dues[k]) > 0 and kind.rule == "full"]
        tree.expect(node, k, min(below, default=0))


def _never(tree: Tree, place: Node) -> int:
    """Nobody will ask for a place again, nor for those above that only lead there. Returns their tokens."""
    pages = 0
    while place.parent is not None and not any(due > 0 for due in place.dues):
        if any(due >= 0 for child in place.children.values() for due in child.dues):
            break
        for k in range(len(tree.kinds)):
            tree.expect(place, k, NEVER)
        pages += place.size
        place = place.parent
    return pages * tree.page_size


def foresee(cache: Cache, keys: Sequence[Key]) -> int:
    """Note what those who wait need to resume, the first in line first. Returns how many tokens that is."""
    tree = cache.tree
    before, tree.queued = tree.queued, {}
    for node in before:
        node.turns = [0] * len(tree.kinds)
    tokens = 0
    for turn, key in enumerate(keys, start=1):
        if tokens >= cache.given.device_size:
            break
        hit = find(tree, key)
        for reach in sorted({hit.length, max(hit.reaches)} - {0}):
            place = place_of(tree, hit, reach // tree.page_size)
            for k in range(len(tree.kinds)):
                start = cache.start_page(k, reach)
                climb = place
                while climb.parent is not None and climb.end > start:
                    if climb not in tree.queued:
                        tokens += climb.size * tree.page_size
                    tree.queued[climb] = None
                    climb.turns[k] = climb.turns[k] or turn
                    climb = climb.parent
    for node in before | tree.queued:
        for shelf in tree.shelves:
            tree.requeue(node, shelf)
    return tokens


# ---- namespaces and tiers -----------------------------------------------------------------------------------------


def drop_namespace(cache: Cache, namespace: str) -> int:
    """Forget a namespace: nothing in it is a hit again. Returns the tokens that live leases keep until they close."""
    tree = cache.tree
    root = tree.roots.pop(namespace, None)
    if root is None:
        return 0
    for serial in [s for s, lease in cache.pins.items() if lease.namespace == namespace]:
        _drop_pin(cache, serial)
    tree.detached.append(root)
    held = 0
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        if not node.held:
            drop_subtree(tree, node)
        else:
            held += node.size * tree.page_size
            stack.extend(node.children.values())
    tree.version += 1
    return held


def forget_tier(cache: Cache, tier: Tier) -> None:
    """Forget all that a tier holds (its memory is about to go), on DEVICE with the pins. ``CacheBusy`` while in use."""
    leases, copies = cache.busy(tier)
    if leases or copies:
        raise words.busy(f"{tier.name} cannot be emptied", leases, copies)
    tree = cache.tree
    for serial in list(cache.pins) if tier is Tier.DEVICE else ():
        _drop_pin(cache, serial)
    stack = [child for root in (*tree.roots.values(), *tree.detached) for child in root.children.values()]
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


def write_to(cache: Cache, tier: Tier, on: bool) -> None:
    """Begin or cease to plan copies that write to a tier; those under way go on."""
    if tier not in (dst for _, dst in DOWN) or tier not in cache.tree.tiers:
        raise words.not_written(tier)
    (cache.traffic.written.add if on else cache.traffic.written.discard)(tier)


def make_room(cache: Cache, kind: str, tokens: int, tier: Tier) -> bool:
    """Evict until ``tokens`` of a kind are free on a tier."""
    for shelf in cache.tree.shelves:
        if shelf.kind.name == kind and shelf.tier is tier:
            size = 1 if kind in (state.kind.name for state in cache.states) else cache.tree.page_size
            return make_room_in(cache.tree, shelf.arena, -(-tokens // size))
    raise words.no_shelf(kind)


# ---- copies on request --------------------------------------------------------------------------------------------


def save(cache: Cache, tier: Tier) -> int:
    """Plan to copy all that a nearer tier holds one step down, as far as ``tier``. Returns the number of moves."""
    planned = 0
    for src, dst in reversed(DOWN):  # what HOST has and is to be read there is not evicted for what comes to HOST
        if dst <= tier and dst in cache.traffic.written:
            planned += _save(cache, src, dst)
    return planned


def _save(cache: Cache, src: Tier, dst: Tier) -> int:
    """Plan to copy all that ``src`` holds and ``dst`` lacks. Returns the number of moves."""
    tree = cache.tree
    planned = 0
    nodes = [child for root in tree.roots.values() for child in root.children.values()]
    for node in nodes:  # parents first: the list grows as it is read
        nodes.extend(node.children.values())
        for source, target in zip(tree.by_tier[src], tree.by_tier[dst], strict=True):
            if source is None or target is None or node.entries[target.index] is not None:
                continue
            entry = node.entries[source.index]
            if entry is not None and flying_to(node, source.kind_index, dst) is None:
                planned += plan(tree, cache.traffic, node, source, target, node.start + entry.lo) is not None
    return planned


def write_down(cache: Cache, key: Key) -> int:
    """Plan to write down what resuming as far as the device has ``key`` needs. Returns the number of moves."""
    tree, traffic = cache.tree, cache.traffic
    hit = find(tree, key)
    if not hit.length:
        return 0
    before = len(traffic.flights)
    place = place_of(tree, hit, hit.length // tree.page_size)
    tree.hold(place)  # room is not made of the same prefix
    write_through(tree, traffic, place, 0)
    tree.release(place)
    prune(tree, place)
    return len(traffic.flights) - before


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Copies from farther tiers to HOST that a waiting request would like to see done; ``tokens`` is their reach."""

    moves: frozenset[int]
    tokens: int


def prefetch(cache: Cache, hit: Hit, tier: Tier) -> Prefetch | None:
    """Plan to bring what ``tier`` would add to a hit to HOST. None when it adds less than ``min_load`` asks for.

    Moves under way already are among those returned; where there is no room the rest is left out.
    """
    tree, traffic = cache.tree, cache.traffic
    reach = cache.boundary(hit, tier)
    if reach <= hit.reach(Tier.HOST):
        return None
    hit = fresh(tree, hit)
    boundary = min(reach, max(hit.reaches))
    place = place_of(tree, hit, boundary // tree.page_size)
    ids: set[int] = set()
    tree.hold(place)
    for k in range(len(tree.kinds)):
        start = cache.start_page(k, boundary)
        target = tree.by_tier[Tier.HOST][k]
        for node, first in missing(tree, place, k, start, Tier.HOST):
            flight = flying_to(node, k, Tier.HOST)
            if flight is None:
                source = sources(tree, node, k, first, exclude=Tier.HOST)
                if source is None or target is None:
                    break
                flight = plan(tree, traffic, node, source, target, first)
                if flight is None:
                    break
            ids.add(flight.id)
    tree.release(place)
    prune(tree, place)
    return Prefetch(frozenset(ids), reach)


# ---- stores and peers ---------------------------------------------------------------------------------------------


def ask(cache: Cache, key: Key, tier: Tier) -> tuple[int, list[int]] | None:
    """How far a key can be resumed with ``tier`` (tokens), and by kind the first page to ask for. None: ask nothing."""
    tree = cache.tree
    hit = find(tree, key)
    reach = hit.reach(tier)
    if not cache.given.reuse or len(key) < reach + tree.page_size or None in tree.by_tier[tier]:
        return None
    firsts = []
    for k in range(len(tree.kinds)):
        first = cache.start_page(k, reach + tree.page_size)
        shelves = [shelf for nearer in tree.tiers if nearer <= tier and (shelf := tree.by_tier[nearer][k]) is not None]
        for node in hit.path:
            begins = [node.start + entry.lo for shelf in shelves if (entry := node.entries[shelf.index]) is not None]
            if node.end > first and min(begins, default=node.end) > first:
                break
            first = max(first, min(node.end, hit.branch // tree.page_size))
        firsts.append(first)
    return reach, firsts


def question(
    kinds: tuple[Kind, ...], naming: Naming, chain: Chain, key: Key, tier: Tier, reach: int, firsts: Sequence[int]
) -> Question:
    """The question of :func:`ask`, its pages named."""
    names = chain(seed_digest(naming.fingerprint, key.namespace, naming.page_size), key.tokens, naming.page_size)
    pages = tuple((kind.name, name) for kind, first in zip(kinds, firsts, strict=True) for name in names[first:])
    return Question(key, tier, kinds, naming.page_size, reach, tuple(firsts), pages)


def offer(cache: Cache, key: Key, start: int) -> Manifest | None:
    """Pin what a peer that can resume at ``start`` needs to resume at the end of ``key``, and say what it is."""
    tree = cache.tree
    hit = find(tree, key)
    pages, least = hit.length // tree.page_size, start // tree.page_size
    if pages <= least:
        return None
    cache.traffic.serial += 1
    place = place_of(tree, hit, pages)
    lease = Lease(0, cache.traffic.serial, place, key.namespace, hit.length, 0)
    pin_place(cache, lease)
    cache.offers[lease.serial] = lease
    page_digests(tree.naming, place)
    parts = []
    for shelf in tree.by_tier[Tier.DEVICE]:
        assert shelf is not None
        first = max(least, lease.starts[shelf.kind_index])
        slots: list[Pages] = []
        names: list[bytes] = []
        climb: Node | None = place
        while climb is not None and climb.end > first:
            entry = climb.entries[shelf.index]
            assert entry is not None
            begin = max(first, climb.start) - climb.start
            slots.append(entry.pages[begin - entry.lo :])
            names[:0] = climb.digests[begin:]
            climb = climb.parent
        if slots:
            parts.append(Part(shelf.kind.name, first, np.concatenate(slots[::-1]), tuple(names)))
    return Manifest(lease.serial, hit.length, tuple(parts))


def settle(cache: Cache, ident: int) -> bool:
    """A manifest was fetched or given up: unpin what it offers. False: there is none of this id."""
    lease = cache.offers.pop(ident, None)
    if lease is None:
        return False
    unpin_place(cache, lease)
    prune(cache.tree, lease.node)
    return True
