"""A plan's tokens as a batch has them, and what the device chose as the plan's requests get it.

A batch has one part for each place after which a token is chosen: a chunk's tokens are one, and each token of its guess
is one more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rootcellar.engine.output import Tracker
from rootcellar.runner import BatchPart, Unread
from rootcellar.runner.sampler import Sampled
from rootcellar.scheduler import Chunk, Plan, Request, keep


@dataclass(frozen=True)
class Chosen:
    """What a step gave.

    Attributes:
        tokens: for each chunk its new tokens.
        rows: for each chunk the row of its first one in what follows; the others come after it.
        logprobs: float32 [rows]: theirs.
        top: logprobs and ids [rows, k] of the likeliest in each place; None: nobody asked.
    """

    tokens: list[Sequence[int]]
    rows: list[int]
    logprobs: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None


def parts_of(chunk: Chunk) -> Iterator[BatchPart]:
    """A chunk in a batch: its tokens, and each token of its guess alone, so that one is chosen after each."""
    row = _row(chunk.request)
    yield BatchPart(row, chunk.start, chunk.request.ids[chunk.start : chunk.stop])
    for j, token in enumerate(chunk.guess):
        yield BatchPart(row, chunk.stop + j, np.array([token]))


def rows_of(plan: Plan) -> list[int]:
    """For each chunk its first part's place among all parts."""
    if not any(c.guess for c in plan.chunks):
        return list(range(len(plan.chunks)))
    return list(itertools.accumulate((1 + len(c.guess) for c in plan.chunks[:-1]), initial=0))


def read(unread: Unread | None, plan: Plan) -> Chosen:
    """What a step gave, once it is there: of a guess what was chosen there too, and the token after that."""
    if unread is None:
        return Chosen([()] * len(plan.chunks), [], np.zeros(0), None)
    chosen, logprobs, top = unread.read()
    tokens, rows = chosen.tolist(), rows_of(plan)
    kept = [keep(c.guess, tokens[row : row + 1 + len(c.guess)]) for c, row in zip(plan.chunks, rows, strict=True)]
    return Chosen(kept, rows, logprobs, top)


def sampled(chunk: Chunk, tracker: Tracker) -> Iterator[Sampled]:
    """What the token after a chunk is chosen by, and that after each token of its guess, as if that were right."""
    request = chunk.request
    grammar = tracker.grammar if chunk.ends else None
    allowed = None if grammar is None else grammar.allowed()
    prompt, output = request.ids[: request.prompt_length], request.output
    for j in range(1 + len(chunk.guess)):
        at = chunk.stop + j
        said = np.concatenate([output, chunk.guess[:j]]).astype(np.int64) if j else output
        banned = request.banned(at) if grammar is None else ()  # a grammar alone says where its answer may end
        yield Sampled(request.sampling, tracker.seed, at, banned, prompt, said, allowed)


def _row(request: Request) -> int:
    assert request.lease is not None
    return request.lease.row
