"""Giving memory back: make room on a shelf, and throw away what nothing can reach any more."""

from __future__ import annotations

from rootcellar.cache.tree import Entry, Node, Shelf, Tree
from rootcellar.errors import CacheBroken


def make_room(tree: Tree, shelf: Shelf, pages: int) -> bool:
    """Evict until ``pages`` are free on the shelf. False, and nothing changed, when that cannot be."""
    slots = shelf.slots
    if slots.free_pages >= pages:
        return True
    if shelf.room < pages:
        return False
    while slots.free_pages < pages:
        found = shelf.order.pop(tree, shelf)
        if found is None:
            raise CacheBroken(
                f"{shelf.kind.name} on {shelf.tier.name}: {shelf.evictable} pages are counted evictable, none is filed"
            )
        node, entry = found
        if shelf.full:
            _drop_tail(tree, shelf, node, pages - slots.free_pages)
        else:
            _drop_head(tree, shelf, node, entry, pages - slots.free_pages)
    return True


def _drop_tail(tree: Tree, shelf: Shelf, node: Node, pages: int) -> None:
    """Evict up to ``pages`` from the end of a full-attention leaf; a longer leaf keeps its upper part."""
    if pages < node.size:
        tree.split(node, node.size - pages)
    _take_off(tree, shelf, node, node.size)
    if not any(
        (other := tree.by_tier[tier][shelf.kind_index]) is not None and node.entries[other.index] is not None
        for tier in tree.tiers
    ):
        drop_subtree(tree, node)


def _drop_head(tree: Tree, shelf: Shelf, node: Node, entry: Entry, pages: int) -> None:
    """Evict up to ``pages`` from the head of an entry; the part that serves the node's end is a step of its own."""
    count = min(pages, entry.evictable)
    inside = node.size - tree.reach(shelf.kind_index, node.end) - entry.lo
    if inside > 0:
        count = min(count, inside)
    _take_off(tree, shelf, node, count)
    tree.restage(node)
    tree.discard(node)


def _take_off(tree: Tree, shelf: Shelf, node: Node, count: int) -> None:
    pages = tree.detach(node, shelf, count)
    shelf.slots.give(pages)
    shelf.evicted += len(pages)


def drop_subtree(tree: Tree, top: Node) -> None:
    """Throw away an unheld node, all below it and every entry they have: no boundary in it can be reached any more."""
    order = [top]
    for node in order:
        order.extend(node.children.values())
    for node in reversed(order):
        for shelf in tree.shelves:
            if node.entries[shelf.index] is not None:
                _take_off(tree, shelf, node, node.size)
        tree.discard(node)
