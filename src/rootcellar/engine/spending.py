"""What steps of prefill took, and whose prompts: what a miss cost is told by that."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from rootcellar.engine.output import Tracker
from rootcellar.misses import PrefillCost, Spent, StepsTaken, filled, learned, pairs
from rootcellar.runner import Shapes
from rootcellar.scheduler import Chunk, Plan, Request

_KEPT = 48
_OFTEN = 8


class Spending:
    """Learns what tokens of prompts take, and notes with each request what its own took.

    Nobody waits for a step that gives no token: the time of such steps is known together with that of the next one that
    does, and parted among their chunks by what such chunks took lately.
    """

    def __init__(self, shapes: Shapes) -> None:
        """Of steps of such ``shapes`` nothing is known."""
        self._shapes = shapes
        self._sizes = tuple(sorted(tiles * tile for tiles, tile in shapes.all() if tile == shapes.tile))
        self.cost = PrefillCost(sizes=self._sizes)
        self._measured: deque[StepsTaken] = deque(maxlen=_KEPT)
        self._count = 0
        self._chunks: list[Chunk] = []
        self._steps = self._tokens = 0
        self._seconds = 0.0

    def step(self, plan: Plan, seconds: float, trackers: Mapping[Request, Tracker]) -> None:
        """``plan`` took so long, or, where it gives no token, to be begun. ``trackers``: of all who are not done."""
        if not plan.decode:
            self._chunks += plan.chunks
            self._steps += 1
            tiles = sum(self._shapes.tiles_of(c.stop - c.start) for c in plan.chunks)
            self._tokens += filled(tiles * self._shapes.tile, self._sizes)
        elif not self._chunks:
            return
        self._seconds += seconds
        if not any(chunk.ends for chunk in plan.chunks):
            return
        chunks, self._chunks = self._chunks, []
        self._learn(chunks)
        weights: list[float] = [self.cost.of(c.start, c.stop) for c in chunks] if self.cost else []
        if not sum(weights):  # or pairs alone seem to cost anything, and each of these is the first token of a prompt
            weights = [c.stop - c.start for c in chunks]
        each = self._seconds / sum(weights)
        for chunk, weight in zip(chunks, weights, strict=True):
            tracker = trackers.get(chunk.request)
            if tracker is not None and tracker.first_token is None:  # later it computes what it had before
                tracker.spend(Spent(chunk.start, chunk.stop, weight * each))
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    def _learn(self, chunks: list[Chunk]) -> None:
        seen = sum(pairs(c.start, c.stop) for c in chunks)
        self._measured.append(StepsTaken(self._steps, self._tokens, seen, self._seconds))
        self._count += 1
        if self._count < _OFTEN or self._count % _OFTEN == 0:
            self.cost = learned(self._measured, self._sizes)
