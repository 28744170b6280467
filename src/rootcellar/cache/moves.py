"""The words between the cache and those who move bytes: moves it wants, and events that tell what became of them.

A move's source on DEVICE may be reused as soon as the next step runs: whoever takes ``cache.moves()`` dispatches them
in order and before that step (dataflow then orders the read before the write). A source on any other tier stays put
until the move is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.slots import Pages


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """A copy that should happen: page ``src_slots[i]`` of ``src`` to page ``dst_slots[i]`` of ``dst``, for one kind.

    ``digests[i]`` names the page's content (see ``digest.py``) where a tier is addressed by content: it is empty
    unless STORAGE or PEER takes part. ``first`` is the index of the first page in its request.
    """

    id: int
    kind: str
    src: Tier
    dst: Tier
    src_slots: Pages
    dst_slots: Pages
    first: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The move's bytes are at its destination."""

    move: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The move did not happen. Leases that wait for it are lost; a source that could not be read is forgotten."""

    move: int


@dataclass(frozen=True, slots=True)
class Found:
    """``tier`` holds what is needed to resume at the end of ``key``: of ``kind``, or of every kind when it is empty.

    ``start`` (tokens) says from where on, when more than the rule needs is there or when a kind is named.
    """

    key: Key
    tier: Tier
    kind: str = ""
    start: int | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """``tier`` no longer holds the pages of ``key`` from token ``start`` on: of ``kind``, or of every kind."""

    key: Key
    tier: Tier
    kind: str = ""
    start: int = 0


Event = Done | Failed | Found | Lost
