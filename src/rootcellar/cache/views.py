"""The tree for pictures: the nodes that matter most, and where a prompt's tokens lie in it. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from rootcellar.cache.journal import Eviction
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.match import find
from rootcellar.cache.node import Node
from rootcellar.cache.tree import Tree

HEAD = 32


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node. Counts are in tokens.

    ``parent`` is the id of the node above, 0 directly below a namespace. The edge covers tokens ``[start, start +
    length)`` of its keys and begins with ``head`` (at most ``HEAD`` ids); ``held[kind name, tier]`` of them are there
    (states, for a recurrent kind). ``hits`` counts the requests that opened it, ``created`` and ``used`` are the ticks
    of its making and its last use. ``in_use``: something alive needs it or what is below. ``children`` counts all of
    them, shown or not.
    """

    id: int
    parent: int
    namespace: str
    start: int
    length: int
    head: tuple[int, ...]
    held: dict[tuple[str, Tier], int]
    hits: int
    created: int
    used: int
    in_use: bool
    children: int


@dataclass(frozen=True, slots=True)
class TreeView:
    """Some of the tree, parents before children; ``total`` nodes in all, ``tick`` now."""

    nodes: tuple[NodeView, ...]
    total: int
    tick: int


def tree_view(tree: Tree, limit: int) -> TreeView:
    """The ``limit`` most important nodes: those in use, then the most often hit, then the most recent.

    Best first among what is directly below the nodes shown already: ``limit`` steps, and a look at all their children.
    A node above is in use when one below is, and hit at least as often, so little that matters hides behind less.
    """
    views: list[NodeView] = []
    heap: list[tuple[tuple[bool, int, int, int], Node, str]] = []

    def open_children(node: Node, namespace: str) -> None:
        for child in node.children.values():
            heappush(heap, ((not child.held, -child.hits, -max(child.ticks), child.id), child, namespace))

    for name, root in tree.roots.items():
        open_children(root, name)
    while heap and len(views) < limit:
        _, node, namespace = heappop(heap)
        views.append(_view(tree, node, namespace))
        open_children(node, namespace)
    return TreeView(tuple(views), tree.nodes, tree.tick)


def _view(tree: Tree, node: Node, namespace: str) -> NodeView:
    parent = node.parent
    assert parent is not None
    size = tree.page_size
    held = {}
    for shelf in tree.shelves:
        entry = node.entries[shelf.index]
        if entry is not None:
            held[shelf.kind.name, shelf.tier] = len(entry.pages) * (1 if shelf.kind.rule == "recurrent" else size)
    return NodeView(
        id=node.id,
        parent=0 if parent.parent is None else parent.id,
        namespace=namespace,
        start=node.start * size,
        length=node.size * size,
        head=tuple(node.tokens[:HEAD].tolist()),
        held=held,
        hits=node.hits,
        created=node.created,
        used=max(node.ticks),
        in_use=node.held,
        children=len(node.children),
    )


def trail(tree: Tree, key: Key) -> tuple[int, ...]:
    """Ids of the nodes that ``key`` goes through, the first below the root first; the last perhaps in part."""
    return tuple(node.id for node in find(tree, key).path)


def last_eviction(tree: Tree, key: Key) -> Eviction | None:
    """The eviction of the page after what the tree knows of ``key``, if it is remembered."""
    hit = find(tree, key)
    node = hit.path[-1] if hit.path else tree.roots.get(key.namespace)
    pages = hit.branch // tree.page_size
    if node is None or pages != node.end or len(key) < hit.branch + tree.page_size:
        return None
    return tree.evictions.find(node.id, tree.first(key.tokens, pages))
