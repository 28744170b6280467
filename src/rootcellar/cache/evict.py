"""Giving memory back: make room in an arena, and throw away what nothing can reach any more."""

from __future__ import annotations

from collections.abc import Iterable

from rootcellar.cache import words
from rootcellar.cache.journal import Eviction
from rootcellar.cache.node import Entry, Node
from rootcellar.cache.shelf import Arena, Shelf
from rootcellar.cache.tree import Tree


def make_room(tree: Tree, arena: Arena, pages: int) -> bool:
    """Evict until ``pages`` are free in the arena. False, and nothing changed, when that cannot be."""
    slots = arena.slots
    if slots.free_pages >= pages:
        return True
    if arena.room < pages:
        return False
    while slots.free_pages < pages:
        found = arena.order.pop(tree.ranking.now)
        if found is None:
            raise words.nothing_filed(arena.name, arena.evictable)
        node, entry = found
        shelf = tree.shelves[entry.shelf]
        if shelf.full:
            _drop_tail(tree, shelf, node, pages - slots.free_pages)
        else:
            _drop_head(tree, shelf, node, entry, pages - slots.free_pages)
    return True


def make_room_for(tree: Tree, needs: Iterable[tuple[Shelf, int]]) -> bool:
    """Make room for so many pages of each shelf at once, summed over those that share an arena; evicts all or nothing.

    False, and nothing changed, when that cannot be.
    """
    sums = _by_arena(needs)
    if any(arena.room < pages for arena, pages in sums.items()):
        return False
    for arena, pages in sums.items():
        make_room(tree, arena, pages)
    return True


def fits(needs: Iterable[tuple[Shelf, int]]) -> bool:
    """Whether :func:`make_room_for` would succeed."""
    return all(arena.room >= pages for arena, pages in _by_arena(needs).items())


def _by_arena(needs: Iterable[tuple[Shelf, int]]) -> dict[Arena, int]:
    sums: dict[Arena, int] = {}
    for shelf, pages in needs:
        sums[shelf.arena] = sums.get(shelf.arena, 0) + pages
    return sums


def _drop_tail(tree: Tree, shelf: Shelf, node: Node, pages: int) -> None:
    """Evict up to ``pages`` from the end of a full-attention leaf; a longer leaf keeps its upper part."""
    if pages < node.size:
        tree.split(node, node.size - pages)
    if tree.spill is not None:
        tree.spill(node, shelf)
    assert node.parent is not None
    _note(tree, shelf, node, node.parent, tree.first(node.tokens, 0), node.size)
    _take_off(tree, shelf, node, node.size)
    prune(tree, node)


def _drop_head(tree: Tree, shelf: Shelf, node: Node, entry: Entry, pages: int) -> None:
    """Evict up to ``pages`` from the head of an entry; the part that serves the node's end is a step of its own."""
    count = min(pages, entry.evictable)
    inside = node.size - tree.ranking.reach(shelf.kind_index, node.end) - entry.lo
    if inside > 0:
        count = min(count, inside)
    elif tree.spill is not None:
        tree.spill(node, shelf)
    _note(tree, shelf, node, node, shelf.kind.name.encode(), count)
    _take_off(tree, shelf, node, count)
    tree.restage(node)
    tree.discard(node)


def _note(tree: Tree, shelf: Shelf, node: Node, where: Node, what: bytes, pages: int) -> None:
    eviction = Eviction(
        tree.tick,
        shelf.kind.name,
        shelf.tier,
        pages * tree.page_size,
        created=node.created,
        used=node.ticks[shelf.kind_index],
    )
    tree.evictions.note(where.id, what, eviction)


def _take_off(tree: Tree, shelf: Shelf, node: Node, count: int) -> None:
    pages = tree.detach(node, shelf, count)
    shelf.give(pages)
    shelf.evicted += len(pages)


def forget_entry(tree: Tree, shelf: Shelf, node: Node) -> None:
    """Take a node's whole entry off a shelf and free its pages; whether the node may stay is for ``prune``."""
    if node.entries[shelf.index] is not None:
        _take_off(tree, shelf, node, node.size)
        tree.restage(node)


def prune(tree: Tree, node: Node) -> None:
    """Throw away what became unreachable at or above a node: dead, or in a namespace that was dropped."""
    unheld = unreachable = None
    climb = node
    while climb.parent is not None:
        if not climb.held:
            unheld = climb
            if tree.dead(climb):
                unreachable = climb
        climb = climb.parent
    top = unheld if climb in tree.detached else unreachable
    if top is not None:
        drop_subtree(tree, top)
    else:
        tree.discard(node)


def drop_subtree(tree: Tree, top: Node) -> None:
    """Throw away an unheld node, all below it and every entry they have; write-backs under way lose their place."""
    order = [top]
    for node in order:
        order.extend(node.children.values())
    for node in reversed(order):
        for shelf in tree.shelves:
            forget_entry(tree, shelf, node)
        for flight in node.flights:
            if flight.node is node:
                flight.node = node.parent if flight.start < node.start else None
        node.flights = []
        tree.discard(node)
