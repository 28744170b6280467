"""The life of a lease: open, grow, commit, close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import words
from rootcellar.cache.adaptive import mix
from rootcellar.cache.cache import Cache, pin_place, pin_sources, pin_windows, unpin_place
from rootcellar.cache.digest import page_digests
from rootcellar.cache.evict import drop_subtree, fits, make_room_for, prune
from rootcellar.cache.flights import write_through
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.lease import Lease
from rootcellar.cache.loads import fits_beside, load, staged
from rootcellar.cache.match import Hit, fresh, place_of
from rootcellar.cache.node import Node
from rootcellar.cache.shelf import Shelf
from rootcellar.cache.slots import Pages
from rootcellar.cache.tree import Tree


def must_be_open(cache: Cache, *leases: Lease) -> None:
    """Raises ``RequestError`` for a lease that is closed, or of another cache."""
    known = cache.leases
    for lease in leases:
        if known.get(lease.row) is not lease:
            raise words.closed(repr(lease))


# ---- open ---------------------------------------------------------------------------------------------------------


def open_lease(cache: Cache, hit: Hit, tier: Tier, priority: int, room: Mapping[str, int] | None) -> Lease | None:
    """Pin what the rule needs at the hit's boundary, plan to load what the device lacks, and give the request a row.

    None, and nothing planned, when a row is lacking, or room for that and for ``room`` more tokens of each paged kind.
    """
    tree, tables = cache.tree, cache.tables
    if not cache.free_rows:
        return None
    if len(hit.key) > cache.given.max_length:
        raise words.key_too_long(len(hit.key), cache.given.max_length)
    hit = fresh(tree, hit)
    boundary = cache.boundary(hit, tier)
    if tier > Tier.HOST and not fits(staged(cache, hit, boundary // tree.page_size)):
        tier = Tier.HOST
        boundary = cache.boundary(hit, tier)
    if room is not None and not fits_beside(cache, hit, boundary // tree.page_size, room):
        return None
    node = place_of(tree, hit, boundary // tree.page_size)
    lease = Lease(0, cache.serial + 1, node, hit.key.namespace, boundary, priority)
    pin_place(cache, lease)
    if not load(cache, lease):
        unpin_place(cache, lease)
        prune(tree, lease.node)
        # What is nearer can still be had when only the copies do not fit together.
        if boundary == hit.length or (room is not None and tier <= Tier.HOST):
            return None
        return open_lease(cache, hit, Tier.HOST if tier > Tier.HOST else Tier.DEVICE, priority, room)
    tree.tick += 1
    tree.use(node, lease.starts)
    cache.serial += 1
    lease.row = cache.free_rows.pop()
    cache.leases[lease.row] = lease
    fill_rows(cache, lease)
    for shelf in cache.states:
        tables.by_kind[shelf.kind_index][lease.row, 1] = shelf.take(1)[0]
    node.count_hit(priority)
    if tree.shadow is not None and cache.given.reuse:
        tree.shadow.advance(len(hit.key))
        lease.observed = (0, mix(crc32(hit.key.namespace.encode("utf-8", "surrogatepass"))), -1)
        _observe(cache, lease, hit.key, 0, boundary // tree.page_size, resident=True)
    return lease


def fill_rows(cache: Cache, lease: Lease) -> None:
    """Write what the tree has on the device of a lease's place into its rows."""
    for shelf in cache.paged:
        _fill_row(cache, lease, shelf, lease.starts[shelf.kind_index])
    for shelf in cache.states:
        source = lease.sources[shelf.kind_index]
        entry = source.entries[shelf.index] if source is not None and source.parent is not None else None
        if entry is not None:
            cache.tables.by_kind[shelf.kind_index][lease.row, 0] = entry.pages[0]


def _fill_row(cache: Cache, lease: Lease, shelf: Shelf, start: int) -> None:
    """Write the tree's pages ``[start, place)`` of one kind into the lease's row."""
    row = cache.tables.by_kind[shelf.kind_index][lease.row]
    climb: Node | None = lease.node
    while climb is not None and climb.end > start:
        entry = climb.entries[shelf.index]
        if entry is not None:
            first = max(start, climb.start + entry.lo)
            row[first : climb.end] = entry.pages[first - climb.start - entry.lo :]
        climb = climb.parent


def _observe(cache: Cache, lease: Lease, key: Key, first: int, pages: int, *, resident: bool) -> None:
    """Tell the shadow that pages ``[first, pages)`` of a request are in the tree; put each node in its class.

    ``resident``: they were there before it came.
    """
    tree, shadow = cache.tree, cache.tree.shadow
    assert shadow is not None
    strides, prefix, above = lease.observed
    prefixes = shadow.hashes(prefix, key.tokens[strides * shadow.stride : pages * tree.page_size])
    classes, above = shadow.observe(prefixes, above, resident)
    lease.observed = (strides + len(prefixes), prefixes[-1] if prefixes else prefix, above)
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


def grow(cache: Cache, lease: Lease, tokens: int, step: bool = True) -> bool:
    """Slots for ``tokens`` more tokens, for one step. False, and nothing changed, when there is no room.

    Less than none: the last slots go back. ``step``: for the next step; else for that of the call before.
    """
    must_be_open(cache, lease)
    if lease.length + tokens > cache.given.max_length:
        raise words.row_full(lease.length, tokens, cache.given.max_length)
    size = cache.tree.page_size
    old = -(-lease.length // size)
    new = -(-(lease.length + tokens) // size)
    if lease.length + tokens < lease.committed or new < max(lease.starts):
        raise words.gives_too_much(-tokens, lease.length, lease.committed)
    if new > old:
        if not make_room_for(cache.tree, [(shelf, new - old) for shelf in cache.paged]):
            return False
        for shelf in cache.paged:
            cache.tables.by_kind[shelf.kind_index][lease.row, old:new] = shelf.take(new - old)
    for shelf in cache.paged if new < old else ():
        row = cache.tables.by_kind[shelf.kind_index][lease.row]
        shelf.give(row[new:old])
        row[new:old] = 0
    if tokens > 0 and step:
        _step_states(cache, lease)
    lease.length += tokens
    return True


def grow_many(cache: Cache, leases: Sequence[Lease], tokens: int | Sequence[int]) -> list[bool]:
    """:func:`grow` for each lease of a batch, in order; one allocation per kind when one token for each fits."""
    size = cache.tree.page_size
    must_be_open(cache, *leases)
    counts = [tokens] * len(leases) if isinstance(tokens, int) else [int(count) for count in tokens]
    if len(counts) != len(leases):
        raise words.uneven("numbers of tokens")
    short = [lease for lease in leases if lease.length % size == 0]
    together = (
        set(counts) <= {1}
        and max([lease.length for lease in leases], default=0) < cache.given.max_length
        and len({lease.row for lease in leases}) == len(leases)
    )
    if not together or (short and not make_room_for(cache.tree, [(shelf, len(short)) for shelf in cache.paged])):
        return [grow(cache, lease, count) for lease, count in zip(leases, counts, strict=True)]
    if short:
        rows = [lease.row for lease in short]
        columns = [lease.length // size for lease in short]
        for shelf in cache.paged:
            cache.tables.by_kind[shelf.kind_index][rows, columns] = shelf.take(len(short))
    if cache.states:
        for lease in leases:
            _step_states(cache, lease)
    for lease in leases:
        lease.length += 1
    return [True] * len(leases)


def _step_states(cache: Cache, lease: Lease) -> None:
    """From its second step on, a lease reads the state it wrote, and the snapshot it began from is pinned no more."""
    if lease.stepped:
        read_own_states(cache, lease)
    lease.stepped = True


def read_own_states(cache: Cache, lease: Lease) -> None:
    """Let the lease read the states it writes, and unpin the snapshots it read before."""
    for shelf in cache.states:
        row = cache.tables.by_kind[shelf.kind_index][lease.row]
        row[0] = row[1]
    pin_sources(cache, lease, None)


# ---- commit -------------------------------------------------------------------------------------------------------


def commit(cache: Cache, lease: Lease, key: Key, snapshot: bool) -> None:
    """Make the whole pages of ``key`` shareable, and release what is out of the rule's reach."""
    must_be_open(cache, lease)
    tree = cache.tree
    size = tree.page_size
    if len(key) > lease.length or key.namespace != lease.namespace:
        raise words.commit_too_long(len(key), key.namespace, lease.length, lease.namespace)
    if cache.given.reuse:
        pin_windows(cache, lease, -1)
        done, pages = lease.committed // size, len(key) // size
        if pages > done:
            place = _insert(cache, lease, key, done, pages)
            if place is not lease.node:
                tree.hold(place)
                if cache.given.write_after >= 0:
                    write_through(tree, cache.traffic, lease.node, cache.given.write_after)
                tree.release(lease.node)
                lease.node = place
            lease.committed = pages * size
            if tree.shadow is not None:
                _observe(cache, lease, key, done, pages, resident=False)
            if cache.given.digests:
                page_digests(tree.naming, lease.node)
    for shelf in cache.windows:
        _release_passed(cache, lease, shelf, len(key))
    if cache.given.reuse:
        pin_windows(cache, lease, 1)
        if snapshot and len(key) == lease.length == lease.committed:
            _take_snapshot(cache, lease)


def _release_passed(cache: Cache, lease: Lease, shelf: Shelf, tokens: int) -> None:
    """Move the start of a window or chunk to what resuming at ``tokens`` needs; pages before it leave the row.

    Those in the tree are merely no longer pinned; those that the lease owns (reuse is off) are free at once.
    """
    k = shelf.kind_index
    old, start = lease.starts[k], cache.start_page(k, tokens)
    if start <= old:
        return
    row = cache.tables.by_kind[k][lease.row]
    owned = max(old, lease.committed // cache.tree.page_size)
    if owned < start:
        shelf.give(row[owned:start])
    row[old:start] = 0
    lease.starts[k] = start


def _insert(cache: Cache, lease: Lease, key: Key, page: int, pages: int) -> Node:
    """Put pages ``[page, pages)`` of the lease into the tree below its place; the node that ends there."""
    tree = cache.tree
    node = lease.node
    while page < pages:
        tokens = key.tokens[page * tree.page_size : pages * tree.page_size]
        child = node.children.get(tree.first(tokens, 0))
        if child is None:
            return _insert_rest(cache, lease, node, tokens, page, pages)
        matched = tree.common(child, tokens, pages - page)
        if matched < child.size:
            child = tree.split(child, matched)
        for shelf in cache.paged:
            _merge(cache, lease, shelf, child)
        child.ticks = [tree.tick] * len(tree.kinds)
        child.priority = max(child.priority, lease.priority)
        page += matched
        node = child
    return node


def _insert_rest(cache: Cache, lease: Lease, node: Node, tokens: NDArray[np.int64], page: int, pages: int) -> Node:
    """Lengthen the lease's own leaf, or give ``node`` a new one."""
    tree = cache.tree
    new: list[Pages] = [table[lease.row, page:pages] for table in cache.tables.by_kind]
    if node is lease.node and _may_lengthen(cache, lease, node):
        tree.extend(node, tokens, pages - page, new)
        return node
    leaf = tree.add(node, tokens, pages - page)
    leaf.owner = lease.serial
    leaf.priority = lease.priority
    for shelf in cache.paged:
        tree.attach(leaf, shelf, new[shelf.kind_index].copy(), 0)
    return leaf


def _may_lengthen(cache: Cache, lease: Lease, node: Node) -> bool:
    """Whether a leaf is this lease's alone and on the device alone, so that its edge may grow in place."""
    if node.owner != lease.serial or node.refs != 1 or node.children or node.flights:
        return False
    held = sum(entry is not None for entry in node.entries)
    return held == len(cache.paged) and all(node.entries[shelf.index] is not None for shelf in cache.paged)


def _merge(cache: Cache, lease: Lease, shelf: Shelf, node: Node) -> None:
    """Where the tree has a page, free the lease's duplicate and use that; where it has none, give it the lease's."""
    row = cache.tables.by_kind[shelf.kind_index][lease.row, node.start : node.end]
    entry = node.entries[shelf.index]
    if entry is None:
        cache.tree.attach(node, shelf, row.copy(), 0)
        return
    lo = entry.lo
    shelf.give(row[lo:])
    row[lo:] = entry.pages
    if lo:
        cache.tree.attach(node, shelf, row[:lo].copy(), 0)


def _take_snapshot(cache: Cache, lease: Lease) -> None:
    """Hand the states just written to the tree, and write elsewhere from now on; skipped when no state is free."""
    tree, node = cache.tree, lease.node
    missing = [shelf for shelf in cache.states if node.entries[shelf.index] is None]
    if not missing or not lease.stepped or node.parent is None:
        return
    read_own_states(cache, lease)
    if not make_room_for(tree, [(shelf, 1) for shelf in missing]):
        return
    for shelf in missing:
        row = cache.tables.by_kind[shelf.kind_index][lease.row]
        tree.attach(node, shelf, row[1:].copy(), node.size - 1)
        row[1] = shelf.take(1)[0]
    for shelf in cache.states:
        entry = node.entries[shelf.index]
        assert entry is not None
        cache.tables.by_kind[shelf.kind_index][lease.row, 0] = entry.pages[0]
    pin_sources(cache, lease, node)
    lease.stepped = False


# ---- close --------------------------------------------------------------------------------------------------------


def close(cache: Cache, lease: Lease, keep: bool) -> None:
    """Give back everything the lease owns and pins; with ``keep`` false also what it alone added to the tree."""
    tree = cache.tree
    must_be_open(cache, lease)
    del cache.leases[lease.row]
    committed, pages = lease.committed // tree.page_size, -(-lease.length // tree.page_size)
    for shelf in cache.paged:
        owned = max(committed, lease.starts[shelf.kind_index])
        shelf.give(cache.tables.by_kind[shelf.kind_index][lease.row, owned:pages])
    for shelf in cache.states:
        shelf.give(cache.tables.by_kind[shelf.kind_index][lease.row, 1:])
    for table in cache.tables.by_kind:
        table[lease.row, : max(pages, 2)] = 0
    cache.free_rows.append(lease.row)
    tree.use(lease.node, lease.starts)
    if keep and cache.given.write_after >= 0:
        write_through(tree, cache.traffic, lease.node, cache.given.write_after)
    unpin_place(cache, lease)
    prune(tree, lease.node if keep else _drop_own(tree, lease))


def _drop_own(tree: Tree, lease: Lease) -> Node:
    """Throw away the nodes the lease added that nobody shares; the first node above that stays."""
    path = [lease.node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    for node in path[:-1]:
        if node.parent is None:  # it held nothing and went with the node below
            continue
        if node.owner != lease.serial or node.held or node.children or node.hits:
            return node
        drop_subtree(tree, node)
    return path[-1]
