"""What the cache holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.cache.kind import Tier
from rootcellar.cache.shelf import Shelf


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
    """The cache at one moment: ``shelves[kind name, tier]`` and running totals in tokens."""

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


def shelf_stats(shelf: Shelf, page_size: int) -> ShelfStats:
    """Count one shelf, O(1)."""
    slots = shelf.arena.slots
    return count_shelf(
        1 if shelf.kind.rule == "recurrent" else page_size,
        slots.pages,
        slots.free_pages,
        shelf.used,
        shelf.cached,
        shelf.evictable,
        shelf.in_flight,
        shelf.evicted,
    )


def count_shelf(
    unit: int, pages: int, free: int, used: int, cached: int, evictable: int, in_flight: int, evicted: int
) -> ShelfStats:
    """The numbers of a shelf, given in pages, in tokens (``unit`` of them a page)."""
    return ShelfStats(
        size=pages * unit,
        free=free * unit,
        used=used * unit,
        cached=cached * unit,
        pinned=(cached - evictable) * unit,
        evictable=evictable * unit,
        leased=(used - cached - in_flight) * unit,
        in_flight=in_flight * unit,
        evicted=evicted * unit,
    )
