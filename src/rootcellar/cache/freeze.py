"""A cache as plain values, and back: how the two cores are compared, checked and explained with the same code.

``freeze`` of the Python cache and ``_frozen`` of the native core are equal tuples when the caches are. ``thaw`` makes
the Python objects that such a tuple, or a part of it, describes, so that ``check``, ``explain`` and ``pretty_print``
exist once: the native core is checked by code that shares nothing with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from rootcellar.cache.cache import Cache
from rootcellar.cache.flights import Traffic
from rootcellar.cache.kind import Tier
from rootcellar.cache.lease import Lease, ReqToTokenPool
from rootcellar.cache.node import Entry, Flight, Node
from rootcellar.cache.settings import Settings
from rootcellar.cache.tree import Tree

Frozen = tuple[Any, ...]
Record = tuple[Any, ...]
_NO_PAGES = np.empty(0, np.int32)


# ---- to values ----------------------------------------------------------------------------------------------------


def freeze(cache: Cache, requests: int, input_tokens: int) -> Frozen:
    """Everything in the cache: counts, nodes, shelves, arenas, leases, free rows, pins, offers, expiries, ..."""
    tree, traffic = cache.tree, cache.traffic
    counts = (
        *(tree.tick, tree.version, tree.nodes, tree.last_id),
        *(cache.serial, traffic.serial, traffic.failed, requests, input_tokens),
    )
    return (
        counts,
        tuple(map(_node, _preorder([*tree.roots.values(), *tree.detached], tree))),
        tuple((s.used, s.entries, s.cached, s.evictable, s.in_flight, s.evicted) for s in tree.shelves),
        tuple((arena.evictable, arena.slots.free_list().tobytes()) for arena in tree.arenas),
        tuple(_lease(lease) for _, lease in sorted(cache.leases.items())),
        tuple(cache.free_rows),
        tuple(_lease(lease) for lease in cache.pins.values()),
        tuple(_lease(lease) for lease in cache.offers.values()),
        tuple(sorted(cache.expiries)),
        tuple(_flight(flight) for _, flight in sorted(traffic.flights.items())),
        _shadow(tree),
        _evictions(tree),
        tuple(map(int, sorted(traffic.written))),
    )


def _preorder(roots: list[Node], tree: Tree) -> Iterable[tuple[Node, Tree]]:
    stack = roots[::-1]
    while stack:
        node = stack.pop()
        yield node, tree
        stack += reversed(node.children.values())


def _node(item: tuple[Node, Tree]) -> Record:
    node, tree = item
    return (
        node.id,
        node.parent.id if node.parent is not None else 0,
        node.namespace if node.parent is None else None,
        node in tree.detached,
        node.start,
        node.size,
        node.tokens.tobytes(),
        node.refs,
        node.far,
        node.created,
        node.hits,
        node.priority,
        node.owner,
        node.group,
        node.used,
        tuple(node.ticks),
        tuple(node.dues),
        tuple(node.turns),
        tuple(node.covers),
        tuple(tuple(sorted(starts.items())) for starts in node.starts),
        tuple(node.kids),
        tuple(map(_entry, node.entries)),
        tuple((f.id, f.kind_index, int(f.src), int(f.dst)) for f in node.flights),
        tuple(node.digests),
    )


def _entry(entry: Entry | None) -> Record | None:
    if entry is None:
        return None
    filed = None
    if entry.item is not None:
        damage, *last, ident, shelf = entry.item[0]
        filed = (damage, *last, *[0] * (2 - len(last)), ident, shelf)
    return entry.pages.tobytes(), entry.lo, entry.evictable, filed


def _lease(lease: Lease) -> Record:
    return (
        *(lease.row, lease.serial, lease.node.id, lease.namespace),
        *(lease.cached, lease.length, lease.committed, lease.priority),
        tuple(lease.starts),
        tuple(source.id if source is not None else None for source in lease.sources),
        *(lease.stepped, tuple(sorted(lease.waits)), lease.lost),
        *lease.observed,
    )


def _flight(flight: Flight) -> Record:
    return (
        *(flight.id, flight.kind_index, int(flight.src), int(flight.dst), flight.start),
        *(flight.slots.tobytes(), flight.held, flight.node.id if flight.node is not None else 0),
        flight.after.id if flight.after is not None else 0,
        tuple(lease.serial for lease in flight.waiters),
    )


def _shadow(tree: Tree) -> Record | None:
    shadow = tree.shadow
    if shadow is None:
        return None
    return (
        *(shadow.stride, shadow.window, shadow.volume),
        *(histogram.tobytes() for histogram in (shadow.worth, shadow.returns, shadow.gone)),
        tuple((prefix, volume, history) for prefix, (volume, history) in shadow.seen.items()),
        *(shadow.sample - 1, shadow.news, shadow.faded),
        *(shadow.resting, shadow.turned, shadow.failures, shadow.watched),
        *(shadow.gap, shadow.lost, shadow.noise, shadow.reach),
    )


def _evictions(tree: Tree) -> Record:
    kinds = {kind.name: k for k, kind in enumerate(tree.kinds)}
    return tuple(
        (where, what, gone.tick, kinds[gone.kind], int(gone.tier), gone.tokens, gone.created, gone.used)
        for where, what, gone in tree.evictions.notes()
    )


def memory_bytes(cache: Cache) -> int:
    """Bytes of what the tree, the orders of leaving and the allocators consist of, as ``sys.getsizeof`` counts them."""
    tree = cache.tree
    seen: set[int] = set()

    def size(thing: object) -> int:
        if id(thing) in seen:
            return 0
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            return sys.getsizeof(thing) + (thing.base.nbytes if isinstance(thing.base, np.ndarray) else 0)
        total = sys.getsizeof(thing)
        if isinstance(thing, dict):
            total += sum(map(size, thing.keys())) + sum(size(v) for v in thing.values() if not isinstance(v, Node))
        elif isinstance(thing, list | tuple):
            total += sum(size(part) for part in thing if not isinstance(part, Node | Entry))
        elif isinstance(thing, Entry):
            total += sum(map(size, (thing.pages, thing.lo, thing.evictable, thing.item)))
        return total

    total = sum(arena.slots.pages * 4 + arena.order.memory_bytes() for arena in tree.arenas)
    for node, _ in _preorder([*tree.roots.values(), *tree.detached], tree):
        total += sys.getsizeof(node)
        total += sum(size(part) for part in (node.children, node.tokens, node.entries, node.kids, node.covers))
        total += sum(size(part) for part in (node.starts, node.ticks, node.dues, node.turns, node.flights))
        total += sum(size(part) for part in (node.digests, node.id))
        total += sum(size(entry) for entry in node.entries)
    return total


# ---- from values --------------------------------------------------------------------------------------------------


def thaw(given: Settings, records: Iterable[Record], *, full: bool) -> Tree:
    """A tree of the nodes in ``records``, each after its parent. Not ``full``: without allocators, for reading only."""
    tree = Tree(given, given.sizes if full else dict.fromkeys(given.sizes, 0))
    nodes: dict[int, Node] = {}
    for record in records:
        if record[0] not in nodes:
            node = nodes[record[0]] = _thaw_node(tree, record, nodes.get(record[1]))
            if node.parent is not None:
                node.parent.children[tree.first(node.tokens, 0)] = node
            elif record[3]:
                tree.detached.append(node)
            else:
                tree.roots[node.namespace] = node
    tree.nodes = sum(node.parent is not None for node in nodes.values())
    return tree


def _thaw_node(tree: Tree, record: Record, parent: Node | None) -> Node:
    ident, _, name, _, start, size, tokens, refs, far, created, hits, priority, owner, group, used, *last = record
    node = Node(ident, parent, np.frombuffer(tokens, np.int64), start, size)
    node.namespace = name or ""
    node.refs, node.far, node.created, node.hits, node.priority = refs, far, created, hits, priority
    node.owner, node.group, node.used = owner, group, used
    ticks, dues, turns, covers, starts, kids, entries, flights, digests = last
    node.dues, node.turns = list(dues), list(turns)
    if any(turns):
        tree.queued[node] = None
    node.ticks, node.covers, node.kids, node.digests = list(ticks), list(covers), list(kids), list(digests)
    node.starts = [dict(pairs) for pairs in starts]
    node.flights = [Flight(i, k, Tier(src), Tier(dst), start, _NO_PAGES, False) for i, k, src, dst in flights]
    for shelf, held in zip(tree.shelves, entries, strict=True):
        entry = None
        if held is not None:
            pages, lo, evictable, filed = held
            entry = Entry(shelf.index, np.frombuffer(pages, np.int32), lo)
            entry.evictable = evictable
            entry.item = (filed, 0, node, entry) if filed is not None else None
        node.entries.append(entry)
    return node


def thaw_cache(given: Settings, frozen: Frozen, tables: ReqToTokenPool) -> Cache:
    """The leases and everything else of a whole :func:`freeze`, over page tables that are shared with the cache."""
    counts, records, shelves, arenas, leases, free_rows, pins, offers, expiries, flights, *_, written = frozen
    tree = thaw(given, records, full=True)
    tree.tick, tree.version, tree.nodes, tree.last_id = counts[:4]
    for shelf, numbers in zip(tree.shelves, shelves, strict=True):
        shelf.used, shelf.entries, shelf.cached, shelf.evictable, shelf.in_flight, shelf.evicted = numbers
    for arena, (evictable, free) in zip(tree.arenas, arenas, strict=True):
        arena.evictable = evictable
        arena.slots.reset(np.frombuffer(free, np.int32))
    cache = Cache(tree, tables, Traffic(written={*map(Tier, written)}), given)
    cache.serial, cache.traffic.serial, cache.traffic.failed = counts[4:7]
    cache.free_rows, cache.expiries = list(free_rows), list(expiries)
    roots = [*tree.roots.values(), *tree.detached]
    nodes = {node.id: node for node, _ in _preorder(roots, tree)}
    for values in leases:
        cache.leases[values[0]] = _thaw_lease(values, nodes)
    for values in pins:
        cache.pins[values[1]] = _thaw_lease(values, nodes)
    for values in offers:
        cache.offers[values[1]] = _thaw_lease(values, nodes)
    for values in flights:
        cache.traffic.flights[values[0]] = _thaw_flight(values, nodes)
    for record in records:
        nodes[record[0]].flights = [cache.traffic.flights[ident] for ident, *_ in record[-2]]
    for values in flights:
        cache.traffic.flights[values[0]].after = cache.traffic.flights.get(values[-2])
    by_serial = {lease.serial: lease for lease in cache.leases.values()}
    for values in flights:
        waiting = (by_serial.get(serial) for serial in values[-1])
        cache.traffic.flights[values[0]].waiters = [lease for lease in waiting if lease is not None]
    return cache


def _thaw_lease(values: Record, nodes: dict[int, Node]) -> Lease:
    row, serial, place, namespace, cached, length, committed, priority, starts, sources, *last = values
    lease = Lease(row, serial, nodes[place], namespace, cached, priority)
    lease.length, lease.committed, lease.starts = length, committed, list(starts)
    lease.sources = [nodes.get(source) for source in sources]
    lease.stepped, waits, lease.lost, *observed = last
    lease.waits = set(waits)
    lease.observed = (observed[0], observed[1], observed[2])
    return lease


def _thaw_flight(values: Record, nodes: dict[int, Node]) -> Flight:
    ident, k, src, dst, start, slots, held, place, *_ = values
    flight = Flight(ident, k, Tier(src), Tier(dst), start, np.frombuffer(slots, np.int32), held)
    flight.node = nodes.get(place)
    return flight
