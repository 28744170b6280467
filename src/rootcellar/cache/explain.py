"""Why a prompt hits as far as it does, and what the tree looks like, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rootcellar.cache.flights import flying_to
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.match import Hit, find
from rootcellar.cache.node import Node
from rootcellar.cache.tree import Tree


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why ``key`` hits as far as it does; ``str()`` of it is for people.

    ``reaches`` is by tier, ``branch`` the longest prefix the tree knows, in whole pages; ``diverges_at`` is the index
    of the first token that no cached prompt has there (None when the whole key is known), ``broken_by`` the kinds that
    lack what resuming at ``branch`` needs on the device, and ``elsewhere`` another namespace that knows more of it.
    """

    tokens: int
    page_size: int
    reaches: dict[Tier, int]
    branch: int
    diverges_at: int | None
    broken_by: tuple[str, ...]
    elsewhere: str | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{self.reaches[Tier.DEVICE]} of {self.tokens} tokens can be resumed on the device."
        return "\n".join([head, *(f"- {reason}" for reason in self.reasons)])


def everybody(_: str) -> bool:
    """Every namespace may be named."""
    return True


def explain(tree: Tree, key: Key, may_name: Callable[[str], bool] = everybody) -> Explanation:
    """Look a key up without touching it, and say what stopped the hit; ``may_name``: which other namespaces."""
    hit = find(tree, key)
    diverges = _diverges_at(tree, hit)
    broken = _broken_kinds(tree, hit)
    elsewhere = _elsewhere(tree, hit, may_name)
    reasons: list[str] = []
    if len(key) < tree.page_size:
        reasons.append(f"The key has {len(key)} tokens; only whole pages of {tree.page_size} are shared (page_size).")
    reasons += [
        f"{hit.reach(tier)} tokens could be resumed once {tier.name} is loaded."
        for tier in tree.tiers
        if hit.reach(tier) > hit.length
    ]
    reasons += [reason for _, reason in broken]
    if tree.page_size <= len(key) and hit.branch < len(key) < hit.branch + tree.page_size:
        reasons.append(f"The last {len(key) - hit.branch} tokens do not fill a page of {tree.page_size}.")
    elif diverges is not None:
        reasons += _parting(tree, hit, diverges)
    if elsewhere is not None:
        name, known = elsewhere
        reasons.append(f"Namespace {name!r} knows {known} tokens of it; namespaces do not share.")
    if not reasons:
        reasons.append("All of it is cached.")
    return Explanation(
        tokens=len(key),
        page_size=tree.page_size,
        reaches={tier: hit.reach(tier) for tier in Tier},
        branch=hit.branch,
        diverges_at=diverges,
        broken_by=tuple(name for name, _ in broken),
        elsewhere=elsewhere[0] if elsewhere else None,
        reasons=tuple(reasons),
    )


def _deepest(tree: Tree, hit: Hit) -> tuple[Node | None, int]:
    """Where the walk ended: the node and how many of its pages matched (the root and 0 when nothing did)."""
    if hit.path:
        return hit.path[-1], hit.branch // tree.page_size - hit.path[-1].start
    return tree.roots.get(hit.key.namespace), 0


def _diverges_at(tree: Tree, hit: Hit) -> int | None:
    """Index of the first token of the key that no cached prompt has there; None when the tree knows all of it."""
    node, pages = _deepest(tree, hit)
    rest = hit.key.tokens[hit.branch :]
    if not len(rest):
        return None
    if node is None:
        return 0
    if pages < node.size:
        edges = [node.tokens[pages * tree.page_size :]]
    else:
        edges = [child.tokens[: tree.page_size] for child in node.children.values()]
    common = 0
    for edge in edges:
        size = min(len(edge), len(rest))
        differs = edge[:size] != rest[:size]
        common = max(common, int(differs.argmax()) if differs.any() else size)
    return hit.branch + common if common < len(rest) else None


def _parting(tree: Tree, hit: Hit, diverges: int) -> list[str]:
    """What is known of the place where the key leaves the tree."""
    reasons = []
    node, pages = _deepest(tree, hit)
    at_end = node is not None and pages == node.size
    gone = tree.evictions.find(node.id, tree.first(hit.key.tokens[hit.branch :], 0)) if at_end and node else None
    if gone is not None and len(hit.key) - hit.branch >= tree.page_size:
        reasons.append(
            f"{gone.tokens} tokens from token {hit.branch} on were evicted from {gone.tier.name} at tick {gone.tick} "
            f"(now {tree.tick}); a larger capacity of {gone.kind!r} would have kept them longer."
        )
    elif diverges > hit.branch:
        reasons.append(
            f"Token {diverges} ({int(hit.key.tokens[diverges])}) is the first that no cached prompt has there; the "
            f"{diverges - hit.branch} tokens before it are less than a page of {tree.page_size}."
        )
    else:
        reasons.append(
            f"Token {diverges} ({int(hit.key.tokens[diverges])}) is the first that no cached prompt has there."
        )
    return reasons


def _broken_kinds(tree: Tree, hit: Hit) -> list[tuple[str, str]]:
    """The kinds that lack, on the device, what resuming at the branching point needs; and what became of it."""
    if hit.length == hit.branch:
        return []
    broken = []
    pages = hit.branch // tree.page_size
    for k, kind in enumerate(tree.kinds):
        start = kind.start(hit.branch) // tree.page_size
        shelf = tree.by_tier[Tier.DEVICE][k]
        assert shelf is not None
        for node in hit.path:
            first, end = max(start, node.start), min(pages, node.end)
            entry = node.entries[shelf.index]
            lo = node.size if entry is None else entry.lo
            present = node.start + lo <= first and (kind.rule != "recurrent" or end == node.end)
            if first < end and not present:
                what = "a state" if kind.rule == "recurrent" else f"tokens {first * tree.page_size} on"
                broken.append((kind.name, f"{kind.name!r} lacks {what} at {hit.branch}: {_fate(tree, node, k)}"))
                break
    return broken


def _fate(tree: Tree, node: Node, k: int) -> str:
    """What became of a node's entry of a kind."""
    kind = tree.kinds[k]
    if flying_to(node, k, Tier.DEVICE) is not None:
        return "it is being loaded."
    for tier in tree.tiers:
        shelf = tree.by_tier[tier][k]
        if tier is not Tier.DEVICE and shelf is not None and node.entries[shelf.index] is not None:
            return f"it is on {tier.name}."
    gone = tree.evictions.find(node.id, kind.name.encode())
    if gone is None and node.parent is not None:
        gone = tree.evictions.find(node.parent.id, tree.first(node.tokens, 0))
    if gone is not None:
        return f"evicted from {gone.tier.name} at tick {gone.tick} (now {tree.tick})."
    return "no snapshot was taken there." if kind.rule == "recurrent" else "it was released or never computed there."


def _elsewhere(tree: Tree, hit: Hit, may_name: Callable[[str], bool]) -> tuple[str, int] | None:
    """The other namespace (that may be named) that knows most of the key, when it knows more than the key's own."""
    names = [name for name in tree.roots if name != hit.key.namespace and may_name(name)]
    best = max(((find(tree, Key(hit.key.tokens, name)).branch, name) for name in names), default=(0, ""))
    return (best[1], best[0]) if best[0] > hit.branch else None


def pretty_print(tree: Tree, limit: int = 100) -> str:
    """The tree, a line per node: its tokens, what each kind has of it on each tier, and who uses it."""
    lines: list[str] = []
    stack = [(root, 0) for root in reversed(list(tree.roots.values()))]
    while stack and len(lines) < limit:
        node, depth = stack.pop()
        lines.append("  " * depth + _line(tree, node))
        stack += [(child, depth + 1) for child in reversed(list(node.children.values()))]
    if stack:
        lines.append(f"... and more ({tree.nodes} nodes in all)")
    return "\n".join(lines)


def _line(tree: Tree, node: Node) -> str:
    if node.parent is None:
        return f"namespace {node.namespace!r}"
    head = np.array2string(node.tokens[:4], separator=" ")[1:-1]
    held = []
    for shelf in tree.shelves:
        entry = node.entries[shelf.index]
        if entry is not None:
            part = f"{len(entry.pages)}/{node.size}" if len(entry.pages) < node.size else "all"
            held.append(f"{shelf.kind.name}@{shelf.tier.name.lower()} {part}")
    size = tree.page_size
    notes = [f"{node.hits} hits"] + (["held"] if node.held else []) + (["copying"] if node.flights else [])
    return f"[{node.start * size}, {node.end * size}) {head} ...: {', '.join(held) or 'nothing'}; {', '.join(notes)}"
