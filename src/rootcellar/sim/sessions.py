"""The turns of a trace: who goes on with whom, and after how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rootcellar.sim.trace import TraceRequest

N = TypeVar("N", int, float)
QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Gaps:
    """How far turns of a session are apart.

    Attributes:
        turns: requests that go on with an earlier one: whose deepest block that was seen is not a prompt's first.
        tokens: prompt tokens that came meanwhile, at each of ``QUANTILES``; empty without turns.
        seconds: the same in time; empty where the trace has no times.
    """

    turns: int
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]


def gaps(requests: Sequence[TraceRequest]) -> Gaps:
    """The gaps before the turns of a trace."""
    last: dict[int, tuple[int, float | None]] = {}  # block -> prompt tokens up to its last use, and when that was
    volume = 0
    tokens: list[int] = []
    seconds: list[float] = []
    for request in requests:
        deepest = next((i for i in reversed(range(len(request.hash_ids))) if request.hash_ids[i] in last), 0)
        if deepest:
            before, then = last[request.hash_ids[deepest]]
            tokens.append(volume - before)
            if then is not None and request.timestamp is not None:
                seconds.append((request.timestamp - then) / 1e3)
        volume += request.input_length
        last.update(dict.fromkeys((*request.hash_ids, *request.output_ids), (volume, request.timestamp)))
    return Gaps(len(tokens), _quantiles(tokens), tuple(round(each, 3) for each in _quantiles(seconds)))


def _quantiles(values: list[N]) -> tuple[N, ...]:
    values.sort()
    return tuple(values[min(len(values) - 1, int(q * len(values)))] for q in QUANTILES) if values else ()
