"""Copies between tiers: what should be copied, and what the movers saw."""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.cache.kind import Tier
from rootcellar.cache.slots import Pages


@dataclass(frozen=True, slots=True)
class Move:
    """A copy that should happen, of pages ``[start, start + len(dst_slots))`` of one kind."""

    id: int
    kind_index: int
    src: Tier
    dst: Tier
    start: int
    dst_slots: Pages
