"""Where entries stand in the order of leaving: what hurts least goes first, then what the policy says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.node import Entry, Node, Standing
from rootcellar.cache.order import AWAITED, QUEUED, policy_named
from rootcellar.cache.shelf import Shelf


class Ranking:
    """Decides, of the entries of one tree, which leaves first; the tree keeps them filed as it says."""

    def __init__(
        self, kinds: Sequence[Kind], page_size: int, policy: str, by_tier: Mapping[Tier, Sequence[Shelf | None]]
    ) -> None:
        self._kinds = kinds
        self._page_size = page_size
        self._policy = policy_named(policy)
        self.shrinks = policy == "mru"  # whether use makes a key smaller, so that it must be filed again at once
        self._shelves = {shelf.index: shelf for row in by_tier.values() for shelf in row if shelf is not None}
        # By window, chunk or recurrent kind: its shelves, nearest first.
        self._windows = {
            k: [shelf for tier in Tier if (shelf := by_tier[tier][k]) is not None]
            for k, kind in enumerate(kinds)
            if kind.rule != "full"
        }

    def now(self, node: Node, entry: Entry) -> Standing | None:
        """Where an entry that an order has filed stands by now; None when it may not leave."""
        shelf = self._shelves[entry.shelf]
        if not entry.evictable or (shelf.full and node.kids[entry.shelf]):
            return None
        return self.standing(node, shelf, entry)

    def standing(self, node: Node, shelf: Shelf, entry: Entry) -> Standing:
        """Where an entry stands in its arena's order: the smallest key leaves first.

        The damage comes first, the policy second: 0 serves no boundary, 1 serves boundaries inside an edge only,
        2 serves a node's end, where requests stopped or parted before. What is said of its future (``expect``) goes
        before the policy, which can but guess: 0 on the device where nobody will ask for it, 3 where somebody will,
        4 where somebody waits to (``foresee``), and of either what is wanted last leaves first, as the offline optimum
        does (Belady 1966).
        """
        damage = self.damage(node, shelf, entry)
        if damage >= AWAITED:
            whens = node.turns if damage == QUEUED else node.dues
            return (damage, -whens[shelf.kind_index], node.id, shelf.index)
        return (damage, *self._policy(node, shelf.kind_index), node.id, shelf.index)

    def damage(self, node: Node, shelf: Shelf, entry: Entry) -> int:
        """How much the next page to leave hurts: see :meth:`standing`."""
        due = node.dues[shelf.kind_index]
        queued = node.turns[shelf.kind_index] > 0
        if due < 0 and not queued and shelf.tier is Tier.DEVICE:
            return 0
        damage = self._damage(node, shelf, entry)
        if queued and (damage == 2 or shelf.kind.rule == "recurrent"):
            return QUEUED
        return AWAITED if due > 0 and damage == 2 else damage

    def _damage(self, node: Node, shelf: Shelf, entry: Entry) -> int:
        if shelf.full:
            return 2 if node.children or not self._windows or self._ends_well(node) else 0
        if shelf.kind.rule == "recurrent":
            return 1 if len(node.children) == 1 else 2
        needed = max(0, node.size - self.reach(shelf.kind_index, node.end))
        if entry.lo == needed:
            return 2
        return 1 if entry.lo < needed or node.children else 0

    def reach(self, k: int, page: int) -> int:
        """Pages before boundary ``page`` that kind ``k`` needs there."""
        return page - self._kinds[k].start(page * self._page_size) // self._page_size

    def _ends_well(self, node: Node) -> bool:
        """Whether, as far as the node itself shows, a request could resume at its end (on any tier)."""
        for k, shelves in self._windows.items():
            need = min(self.reach(k, node.end), node.size)
            if need and not any(
                (entry := node.entries[shelf.index]) is not None and entry.lo <= node.size - need for shelf in shelves
            ):
                return False
        return True
