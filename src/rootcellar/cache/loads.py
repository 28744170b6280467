"""What opening a lease takes: whether there is room, which is counted, and the copies of what the device lacks."""

from __future__ import annotations

from collections.abc import Mapping

from rootcellar.cache.cache import Cache
from rootcellar.cache.evict import fits, make_room_for
from rootcellar.cache.flights import call_off, fetch, flying_to, missing, sources
from rootcellar.cache.kind import Tier
from rootcellar.cache.lease import Lease
from rootcellar.cache.match import Hit
from rootcellar.cache.node import Flight, Node
from rootcellar.cache.shelf import Shelf


def fits_beside(cache: Cache, hit: Hit, pages: int, room: Mapping[str, int]) -> bool:
    """Whether a fresh hit can be opened at boundary ``pages`` and ``room`` more of each paged kind then be grown.

    It is counted, not tried: a request that has to wait for room leaves no trace, not even an edge that was split.
    """
    tree = cache.tree
    needs: list[tuple[Shelf, int]] = []
    for shelf in cache.paged + cache.states:
        k = shelf.kind_index
        start = cache.start_page(k, pages * tree.page_size)
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


def staged(cache: Cache, hit: Hit, pages: int) -> list[tuple[Shelf, int]]:
    """What HOST must have room for so that a fresh hit can be opened at boundary ``pages``, by shelf.

    What only STORAGE has passes through it, and what HOST holds on the way may leave now, and not then.
    """
    tree = cache.tree
    needs: list[tuple[Shelf, int]] = []
    for shelf in cache.paged + cache.states:
        k = shelf.kind_index
        host, storage = tree.by_tier[Tier.HOST][k], tree.by_tier[Tier.STORAGE][k]
        if host is None or storage is None:
            continue
        start = cache.start_page(k, pages * tree.page_size)
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


def load(cache: Cache, lease: Lease) -> bool:
    """Make room for the copies and states a new lease needs, and plan the copies. False: no room, nothing planned."""
    tree, traffic = cache.tree, cache.traffic
    needs: list[tuple[Shelf, int]] = []
    wanted: list[tuple[Shelf, list[tuple[Node, int]]]] = []
    for shelf in cache.paged + cache.states:
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
