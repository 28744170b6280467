"""What a step computes, as the scheduler decides it; and what goes into the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from rootcellar.cache import Kind
from rootcellar.scheduler.request import Finish, Request
from rootcellar.scheduler.stages import Stage

POLICIES: dict[str, Callable[[Request, int], tuple[int, ...]]] = {
    "lpm": lambda request, cached: (-cached, request.order),
    "fcfs": lambda request, _cached: (request.order,),
}
TILE = 16
"""Prompt tokens that cost a step about as much as one does."""
Follow = Callable[[int, int], Finish | None]
"""Told that token ``j`` of chunk ``i`` was added to its request; a ``Finish`` when that is to be its last."""


class Chunk(NamedTuple):
    """Tokens [start, stop) of a request, to be computed in one step.

    ``ends``: the step gives the request's next token, and one more for each token of ``guess`` that is right: these are
    computed after the others, and there are slots for them.
    """

    request: Request
    start: int
    stop: int
    ends: bool
    guess: tuple[int, ...] = ()


new_chunk: Callable[[tuple[Request, int, int, bool, tuple[int, ...]]], Chunk] = partial(tuple.__new__, Chunk)
"""The chunk of these fields, in half the time of a call of the class: for each row of each decode step."""


@dataclass(frozen=True)
class Plan:
    """One step: chunks of several requests; ``decode`` when each is a request's newest token, guessed ones behind it.

    ``sources``: when it was planned ahead, for each chunk the one of the step before whose token it computes.
    """

    chunks: tuple[Chunk, ...]
    decode: bool
    sources: tuple[int, ...] = ()

    @property
    def requests(self) -> list[Request]:
        """Those whose chunks they are."""
        return [chunk.request for chunk in self.chunks]

    @property
    def guesses(self) -> bool:
        """Whether it verifies any."""
        return any(chunk.guess for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens that it computes."""
        return sum(chunk.stop - chunk.start + len(chunk.guess) for chunk in self.chunks)

    @property
    def cost(self) -> int:
        """Prompt tokens that it takes as long as: a chunk costs whole tiles, and decoding nearly nothing."""
        return 0 if self.decode else sum(tiled(chunk.stop - chunk.start) for chunk in self.chunks)


def tiled(tokens: int) -> int:
    """Prompt tokens that a step computes for these of one request, those that fill up the last tile among them."""
    return -(-tokens // TILE) * TILE


def decode_step(chunks: tuple[Chunk, ...], sources: tuple[int, ...] = ()) -> Plan:
    """The step of these chunks, each of a request's newest token, whose requests decode from now on."""
    loop = Stage.DECODE_LOOP  # once, and by place: to look names up takes as long as all else for a row
    for chunk in chunks:
        if chunk[0].stage is not loop:
            chunk.request.enter(loop)
    return Plan(chunks, decode=True, sources=sources)


def room_for(kinds: Sequence[Kind], pending: Sequence[int], chunk: int, page_size: int) -> dict[str, int]:
    """Tokens of each paged kind, by its name, that requests with so many to compute hold more until they decode.

    ``chunk``: most of a request in one step. A page for each is counted on top.
    """
    reserve = page_size * len(pending)
    return {
        kind.name: sum(kind.held(n, chunk) for n in pending) + reserve for kind in kinds if kind.rule != "recurrent"
    }


def little_of(chunk: int) -> int:
    """Prompt tokens that are little in a step of up to ``chunk``: an eighth of it, at least a tile."""
    return max(TILE, chunk // 8)
