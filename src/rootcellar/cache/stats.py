"""What the cache holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.cache.kind import Tier
from rootcellar.cache.node import Shelf
from rootcellar.cache.tree import Tree


@dataclass(frozen=True, slots=True)
class ShelfStats:
    """One kind on one tier, in tokens (states for a recurrent kind).

    ``size = free + used``, ``used = cached + leased + in_flight`` and ``cached = pinned + evictable``; ``leased`` is
    what running requests own and have not committed, ``in_flight`` the destinations of copies under way. Where kinds
    share an arena, ``size`` and ``free`` are the arena's, and ``used`` must be summed over its kinds.
    """

    size: int
    free: int
    used: int
    cached: int
    pinned: int
    evictable: int
    leased: int
    in_flight: int
    evicted: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot of the cache: ``shelves[kind name, tier]`` and running totals in tokens."""

    shelves: dict[tuple[str, Tier], ShelfStats]
    leases: int
    nodes: int
    ticks: int
    requests: int
    input_tokens: int
    hit_tokens: int
    hit_tokens_by_tier: dict[Tier, int]

    @property
    def hit_rate(self) -> float:
        """Hit tokens over input tokens, 0 to 1."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


def shelf_stats(tree: Tree, shelf: Shelf) -> ShelfStats:
    """Count one shelf, O(1)."""
    unit = 1 if shelf.kind.rule == "recurrent" else tree.page_size
    slots = shelf.arena.slots
    return ShelfStats(
        size=slots.pages * unit,
        free=slots.free_pages * unit,
        used=shelf.used * unit,
        cached=shelf.cached * unit,
        pinned=(shelf.cached - shelf.evictable) * unit,
        evictable=shelf.evictable * unit,
        leased=(shelf.used - shelf.cached - shelf.in_flight) * unit,
        in_flight=shelf.in_flight * unit,
        evicted=shelf.evicted * unit,
    )
