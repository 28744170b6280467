"""How prompts are cut into chunks: as many tokens as a step has for each, up to where a chunk had better end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rootcellar.scheduler.placeholders import Span
from rootcellar.scheduler.request import Request
from rootcellar.scheduler.shares import portions
from rootcellar.scheduler.snapshots import Snapshots

HasVectors = Callable[[Request, Span], bool]
"""Whether the vectors of a request's span are there."""


@dataclass
class Cutter:
    """Cuts the prompts of steps of up to ``tokens`` tokens in ``tiles`` tiles.

    ``tiles_of``: tiles that so many tokens of one request take. ``snapshots``: where requests leave recurrent states;
    None: the model has none. ``seen``: which vectors of spans are there; None: no request has spans.
    """

    tokens: int
    tiles: int
    tiles_of: Callable[[int], int]
    page_size: int
    snapshots: Snapshots | None
    seen: HasVectors | None = None

    def able(self, requests: list[Request]) -> list[Request]:
        """Those of ``requests`` whose next token can be computed now."""
        seen = self.seen
        return requests if seen is None else [r for r in requests if not blind(r, seen)]

    def counts(self, prefilling: Sequence[Request], turn: int) -> dict[Request, int]:
        """How many tokens of each are computed in the next step, the oldest first; ``turn`` counts steps."""
        tiles, spare = self.tiles, 0
        counts: dict[Request, int] = {}
        shares = portions(prefilling, self.tokens, turn)
        for request, n in (shares if self.seen is None else unbroken(shares)).items():
            most = n + spare
            n = self._end_well(request, min(request.remaining, most))
            need = self.tiles_of(n)
            if n <= 0 or need > tiles:
                continue
            tiles, spare = tiles - need, most - n
            counts[request] = n
        return counts

    def _end_well(self, request: Request, n: int) -> int:
        """Of a chunk of up to ``n`` tokens, as many as end on a page, so that all of it is shared, or at a snapshot;
        and inside of no atomic span, whatever that costs.
        """
        most = request.computed + n
        if self.page_size < n < request.remaining:
            n -= (request.computed + n) % self.page_size
        n = n if self.snapshots is None else self.snapshots.stop(request, request.computed + n) - request.computed
        if not request.spans or self.seen is None:
            return n
        stop = whole(request, request.computed + n, self.seen)
        return (stop if stop > request.computed else whole(request, most, self.seen)) - request.computed


def next_span(request: Request) -> Span | None:
    """The first of a request's spans that is not computed."""
    return next((span for span in request.spans if span.stop > request.computed), None)


def blind(request: Request, seen: HasVectors) -> bool:
    """Whether the next token of ``request`` is of a span whose vectors are not there."""
    span = next_span(request) if request.spans else None
    return span is not None and span.start <= request.computed and not seen(request, span)


def whole(request: Request, stop: int, seen: HasVectors) -> int:
    """Where a chunk that would end at ``stop`` ends, so that it has its spans' vectors, and of atomic ones all."""
    for span in request.spans:
        if request.computed < span.stop and span.start < stop:
            if span.atomic and stop < span.stop:
                return span.start
            if not seen(request, span):
                return max(span.start, request.computed)
    return stop


def unbroken(shares: dict[Request, int]) -> dict[Request, int]:
    """Shares of a step's tokens; the first that breaks the atomic span it begins with becomes as long, and first."""
    for request, tokens in shares.items():
        span = next_span(request) if request.spans else None
        if span is not None and span.atomic and span.start == request.computed and tokens < span.stop - span.start:
            return {request: span.stop - span.start} | {r: n for r, n in shares.items() if r is not request}
    return shares
