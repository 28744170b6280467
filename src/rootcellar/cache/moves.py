"""The words between the cache and those who move bytes: moves it wants, and events that tell what became of them.

A move's source on DEVICE may be reused as soon as the next step runs: whoever takes ``cache.moves()`` dispatches them
in order and before that step (dataflow then orders the read before the write). A source on any other tier stays put
until the move is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rootcellar.cache.key import Key
from rootcellar.cache.kind import Tier
from rootcellar.cache.slots import Pages

if TYPE_CHECKING:
    from rootcellar.cache.lease import Lease
    from rootcellar.cache.node import Node


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


class Flight:
    """A move under way, as the tree sees it: pages ``[start, node.end)`` of one kind, on the path to ``node``.

    ``node`` is the lowest node; when it is split, the parts above are found by climbing to ``start``. ``held`` says
    that the flight holds its place and its source; what is written down from the device is read at once and is not.
    ``node`` is None when the place was thrown away meanwhile.
    """

    __slots__ = ("dst", "held", "id", "kind_index", "node", "slots", "src", "start", "waiters")

    def __init__(self, ident: int, kind_index: int, src: Tier, dst: Tier, start: int, slots: Pages, held: bool) -> None:
        self.id = ident
        self.kind_index = kind_index
        self.src = src
        self.dst = dst
        self.start = start
        self.slots = slots
        self.held = held
        self.node: Node | None = None
        self.waiters: list[Lease] = []

    def blocks(self, kind_index: int, tier: Tier) -> bool:
        """Whether entries of this kind on this tier must stay where they are until the flight ends."""
        return kind_index == self.kind_index and (tier is self.dst or (self.held and tier is self.src))
