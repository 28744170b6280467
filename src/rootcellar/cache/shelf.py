"""Where entries stand: shelves (a kind on a tier), and the arenas whose pages they take."""

from __future__ import annotations

from rootcellar.cache.adaptive import LearnedOrder, Shadow
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.order import Order
from rootcellar.cache.slots import Pages, SlotAllocator


class Arena:
    """Pages that one shelf has for itself or several share, and the one order in which their entries leave.

    Shared pages belong to whichever kind took them: no split has to be guessed beforehand, and what leaves next is the
    worst entry of all kinds (Jenga, Zhang et al. 2025, and vLLM's hybrid KV cache manager share pages alike).
    """

    __slots__ = ("evictable", "name", "order", "slots")

    def __init__(self, name: str, slots: SlotAllocator, shadow: Shadow | None) -> None:
        self.name = name
        self.slots = slots
        self.order: Order | LearnedOrder = Order() if shadow is None else LearnedOrder(shadow)
        self.evictable = 0

    @property
    def room(self) -> int:
        """Pages that could be had now: free, or evictable."""
        return self.slots.free_pages + self.evictable


class Shelf:
    """One kind on one tier: the arena that its pages come from, and its counts (all in pages)."""

    __slots__ = (
        "arena",
        "cached",
        "entries",
        "evictable",
        "evicted",
        "full",
        "in_flight",
        "index",
        "kind",
        "kind_index",
        "tier",
        "used",
    )

    def __init__(
        self,
        index: int,
        kind: Kind,
        kind_index: int,
        tier: Tier,
        arena: Arena,
    ) -> None:
        self.index = index
        self.kind = kind
        self.kind_index = kind_index
        self.tier = tier
        self.full = kind.rule == "full"
        self.arena = arena
        self.used = 0  # taken from the arena and not given back
        self.entries = 0  # entries in the tree
        self.cached = 0
        self.evictable = 0
        self.in_flight = 0  # destinations of moves
        self.evicted = 0

    def take(self, count: int) -> Pages:
        """``count`` free pages; the caller has made room for them."""
        self.used += count
        return self.arena.slots.take(count)

    def give(self, pages: Pages) -> None:
        """Return pages taken before."""
        self.used -= len(pages)
        self.arena.slots.give(pages)
