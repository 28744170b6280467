"""The words between the cache and those who move bytes: moves it wants, and events that tell what became of them.

A move's source on DEVICE may be reused as soon as the next step runs: whoever takes ``cache.moves()`` dispatches them
in order and before that step (dataflow then orders the read before the write). A source on any other tier stays put
until the move is reported. What comes up from STORAGE is two moves, to HOST and from there to DEVICE, and the second
is asked for when the first is done: a move is from DEVICE to HOST, from HOST to STORAGE, or one of the ways back, or
comes from PEER. What goes to a peer is fetched by it, and offered in a manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier
from rootcellar.cache.slots import Pages

PIECE = 64
"""Pages of full attention that are learned of, and loaded, as one."""


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


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Pages of one kind that a peer may fetch: ``slots[i]`` of DEVICE is page ``first + i``, called ``digests[i]``."""

    kind: str
    first: int
    slots: Pages
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """What one peer needs in order to resume at ``tokens``. It stays where it is until ``id`` is reported."""

    id: int
    tokens: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What a store or a peer has to be asked of a key, and what its answer means.

    ``pages`` are kind and digest of each page that may be of use, kind by kind, those of a kind from page ``firsts[k]``
    to the key's end; what the rule needs before that is on ``tier`` or nearer. ``reach`` (tokens) is so already.
    """

    key: Key
    tier: Tier
    kinds: tuple[Kind, ...]
    page_size: int
    reach: int
    firsts: tuple[int, ...]
    pages: tuple[tuple[str, bytes], ...]

    def answer(self, held: Sequence[bool], piece: int = PIECE) -> list[Found]:
        """What the cache should learn, in order, when ``held`` says of each of ``pages`` whether it is there: the
        longest boundary that it makes good; nothing when there is none.

        Full attention is found in pieces of up to ``piece`` pages, each of which becomes a node, and a move of its own
        when it is loaded: what has come by a deadline is used. The other kinds follow, one event each.
        """
        size, total = self.page_size, len(self.key) // self.page_size
        answers = iter(held)
        runs: list[list[int]] = []  # by kind and boundary, in pages: where the run of pages begins that ends there
        for first in self.firsts:
            run = [0] * (first + 1)
            for page in range(first, total):
                run.append(run[page] if next(answers) else page + 1)
            runs.append(run)
        for n in range(total, self.reach // size, -1):
            starts = [kind.start(n * size) // size for kind in self.kinds]
            if all(run[n] <= start for run, start in zip(runs, starts, strict=True)):
                parts = list(zip(self.kinds, map(max, starts, self.firsts), strict=True))
                fulls = [part for part in parts if part[0].rule == "full"]
                ends = [*range(min((first for _, first in fulls), default=n) + piece, n, piece), n]
                found = [(end, *part) for end in ends for part in fulls]
                found += [(n, *part) for part in parts if part not in fulls]
                return [
                    Found(self.key[: end * size], self.tier, kind.name, first * size)
                    for end, kind, first in found
                    if first < end
                ]
        return []


@dataclass(frozen=True, slots=True)
class Done:
    """The move's bytes are at its destination; or the peer has fetched what a manifest offers."""

    move: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The move did not happen. Leases that wait for it are lost; a source that could not be read is forgotten.

    Of a manifest: the peer will not fetch it (any more).
    """

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


@dataclass(frozen=True, slots=True)
class Answer:
    """What a store said to question ``serial``: what the cache should learn, possibly nothing."""

    serial: int
    events: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Reports:
    """What those who move bytes saw since they were last asked; false when that is nothing."""

    events: tuple[Event, ...] = ()
    answers: tuple[Answer, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.events or self.answers)

    def __add__(self, later: Reports) -> Reports:
        return Reports(self.events + later.events, self.answers + later.answers)
