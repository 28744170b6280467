"""How far a key is cached: the boundary search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rootcellar.cache import words
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.node import Node
from rootcellar.cache.slots import Pages
from rootcellar.cache.tree import Tree
from rootcellar.errors import RequestError


@dataclass(frozen=True, slots=True, repr=False)
class Hit:
    """What the cache holds of a key, in tokens.

    ``length`` can be resumed on the device now, ``reach(tier)`` once everything up to that tier is loaded, and
    ``branch`` is the longest prefix that the tree knows at all (where to take a recurrent snapshot).
    """

    key: Key
    version: int
    reaches: tuple[int, int, int, int]
    branch: int
    path: tuple[Node, ...]

    @property
    def length(self) -> int:
        """Tokens that can be resumed on the device, nothing loaded."""
        return self.reaches[Tier.DEVICE]

    def reach(self, tier: Tier) -> int:
        """Tokens that can be resumed once entries on ``tier`` and nearer ones are loaded."""
        return self.reaches[tier]

    def __repr__(self) -> str:
        return words.hit(self.key, self.reaches, self.branch)


def find(tree: Tree, key: Key) -> Hit:
    """Walk down the tree along ``key``; the answer is the longest boundary ``n`` at which every kind has its range.

    For each tier and kind the walk carries where the present run begins that ends at the current page. A boundary is
    good when that page is not after the kind's ``start``.
    """
    root = tree.roots.get(key.namespace)
    size = tree.page_size
    total = len(key) // size
    path: list[Node] = []
    page = 0
    best = [0] * len(tree.tiers)
    runs = [[0] * len(tree.kinds) for _ in tree.tiers]
    node = root
    while node is not None and page < total:
        child = node.children.get(tree.first(key.tokens, page))
        if child is None:
            break
        path.append(child)
        matched = tree.common(child, key.tokens[page * size :], total - page)
        heads = [child.size] * len(tree.kinds)
        for i, tier in enumerate(tree.tiers):
            _nearer(tree, child, tier, heads)
            boundary = _last_boundary(tree, page, page + matched, heads, runs[i])
            if boundary > page:
                best[i] = boundary
            if matched == child.size:
                run = runs[i]
                for k, head in enumerate(heads):
                    if head:
                        run[k] = page + head
        page += matched
        if matched < child.size:
            break
        node = child
    reaches = [0, 0, 0, 0]
    for i, tier in enumerate(tree.tiers):
        for farther in range(tier, 4):
            reaches[farther] = max(reaches[farther], best[i] * size)
    return Hit(key, tree.version, (reaches[0], reaches[1], reaches[2], reaches[3]), page * size, tuple(path))


def fresh(tree: Tree, hit: Hit) -> Hit:
    """The hit, looked up again when the tree has changed since."""
    return hit if hit.version == tree.version else find(tree, hit.key)


def _nearer(tree: Tree, node: Node, tier: Tier, heads: list[int]) -> None:
    """Lower ``heads`` (by kind, the first page of the node that is present on the tiers so far) by one more tier."""
    for k, shelf in enumerate(tree.by_tier[tier]):
        if shelf is not None:
            entry = node.entries[shelf.index]
            if entry is not None and entry.lo < heads[k]:
                heads[k] = entry.lo


def _last_boundary(tree: Tree, begin: int, end: int, heads: list[int], runs: list[int]) -> int:
    """The largest good boundary in pages ``(begin, end]`` of a node; ``begin`` when there is none.

    ``start`` of every rule never falls as ``n`` grows, so within one run a kind either allows its last boundary or
    none; otherwise only the boundaries at which it needs nothing (``resets``) are left.
    """
    n = end
    k = 0
    while k < len(heads):
        head = begin + heads[k]
        if n > head:
            run = head if heads[k] else runs[k]
            if run <= tree.kinds[k].start(n * tree.page_size) // tree.page_size:
                k += 1
                continue
        reset = tree.resets[k]
        last = min(n, max(head, begin))
        last = last - last % reset if reset else begin
        if last <= begin:
            return begin
        if last == n:
            k += 1
        else:
            n = last
            k = 0
    return n


def place_of(tree: Tree, hit: Hit, pages: int) -> Node:
    """The node that ends at boundary ``pages`` of a fresh hit, split off when the boundary is inside an edge."""
    if pages == 0:
        return tree.root(hit.key.namespace)
    for node in reversed(hit.path):
        if node.start < pages:
            return node if node.end == pages else tree.split(node, pages - node.start)
    raise RequestError(f"boundary {pages} is not on the path of {hit.key!r}")


def touch(tree: Tree, hit: Hit) -> None:
    """Note that the hit's farthest boundary was asked for."""
    pages = max(hit.reaches) // tree.page_size
    for node in reversed(hit.path):
        if node.start < pages:
            tree.use(node, [kind.start(pages * tree.page_size) // tree.page_size for kind in tree.kinds])
            return


def slots(tree: Tree, hit: Hit, kind: str) -> Pages:
    """Where the device holds a hit's tokens, for a paged kind: int32 ``[hit.length]``, in page 0 where it does not."""
    shelves = {s.kind.name: s for s in tree.shelves if s.tier is Tier.DEVICE and s.kind.rule != "recurrent"}
    if kind not in shelves:
        raise words.no_paged_kind(kind)
    hit = fresh(tree, hit)
    table = np.zeros(hit.length // tree.page_size, np.int32)
    for node in hit.path:
        entry = node.entries[shelves[kind].index]
        if entry is not None:
            part = table[node.start + entry.lo : node.end]
            part[:] = entry.pages[: len(part)]
    offsets = np.arange(tree.page_size)
    return (table[:, None] * tree.page_size + offsets).astype(np.int32).ravel()
