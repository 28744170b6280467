"""A plan's tokens as a batch has them, and what the device chose as the plan's requests get it.

A batch has one part for each place after which a token is chosen: a chunk's tokens are one, and each token of its guess
is one more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array

from rootcellar.engine.output import Tracker
from rootcellar.engine.recorder import Start
from rootcellar.runner import Batch, BatchPart, Runner, Unread, Vectors
from rootcellar.runner.sampler import Sampled
from rootcellar.scheduler import Chunk, Plan, Request, keep


@dataclass(frozen=True)
class Launched:
    """A step that the device has: what it computes, what will have been chosen (None: nothing), and when it began.

    ``batch``: its tokens as the device has them. ``scores``: what the step gives; there when it is over.
    """

    plan: Plan
    batch: Batch
    scores: Array
    unread: Unread | None
    start: Start


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


VectorsOf = Callable[[Request, int, int], Vectors | None]
"""The vectors of what is no token in so many tokens of a request, from the first to before the second."""


def parts_of(plan: Plan, given: VectorsOf | None = None) -> list[BatchPart]:
    """A batch's parts: each chunk's tokens, and each token of its guess alone, so that one is chosen after each.

    ``given``: of models that know more than tokens.
    """
    if given is not None:
        return [part for chunk in plan.chunks for part in _seeing(chunk, given)]
    if not plan.guesses:
        return [BatchPart(_row(c.request), c.start, c.request.ids[c.start : c.stop]) for c in plan.chunks]
    return [part for chunk in plan.chunks for part in _parts(chunk)]


def _parts(chunk: Chunk) -> Iterator[BatchPart]:
    row = _row(chunk.request)
    yield BatchPart(row, chunk.start, chunk.request.ids[chunk.start : chunk.stop])
    for j, token in enumerate(chunk.guess):
        yield BatchPart(row, chunk.stop + j, np.array([token]), follows=True)


def _seeing(chunk: Chunk, given: VectorsOf) -> Iterator[BatchPart]:
    """A chunk's parts with their vectors and their places."""
    request = chunk.request
    for part in _parts(chunk):
        stop = part.start + len(part.tokens)
        places = None if request.places is None else request.places[:, part.start : stop]
        yield part._replace(given=given(request, part.start, stop) if request.spans else None, places=places)


def rows_of(plan: Plan) -> list[int]:
    """For each chunk its first part's place among all parts."""
    if not plan.guesses:
        return list(range(len(plan.chunks)))
    return list(itertools.accumulate((1 + len(c.guess) for c in plan.chunks[:-1]), initial=0))


def settled_rows(plan: Plan) -> list[tuple[int, int]]:
    """Once the plan's tokens were taken: for each chunk of whose guess some are its request's, its part's place, and
    that of the last of these.
    """
    kept = ((row, chunk.request.length - 1 - chunk.stop) for chunk, row in zip(plan.chunks, rows_of(plan), strict=True))
    return [(row, row + right) for row, right in kept if right > 0]


def sampled_of(plan: Plan, trackers: Mapping[Request, Tracker]) -> list[Sampled]:
    """What the token after each part is chosen by; after a token of a guess as if the guess were right."""
    if not plan.guesses:
        return [_sampled(c, trackers[c.request], 0) for c in plan.chunks]
    return [_sampled(c, trackers[c.request], j) for c in plan.chunks for j in range(1 + len(c.guess))]


def _sampled(chunk: Chunk, tracker: Tracker, j: int) -> Sampled:
    """What the token after the ``j``-th of a chunk's guess is chosen by; 0: after the chunk's own."""
    request, at = chunk.request, chunk.stop + j
    grammar = tracker.grammar if chunk.ends else None
    return Sampled(
        request.sampling,
        tracker.seed,
        at,
        request.banned(at) if grammar is None else (),  # a grammar alone says where its answer may end
        request.ids[: request.prompt_length],
        np.concatenate([request.output, chunk.guess[:j]]).astype(np.int64) if j else request.output,
        None if grammar is None else grammar.allowed(),
    )


def read(launched: Launched) -> Chosen:
    """What a step gave, once it is there: of a guess what was chosen there too, and the token after that.

    Waits also where nothing is chosen: else the steps of a long prompt pile up on the device before whoever comes.
    """
    plan, unread, rows = launched.plan, launched.unread, rows_of(launched.plan)
    if unread is None:
        jax.block_until_ready(launched.scores)
        return Chosen([()] * len(rows), rows, np.zeros(0), None)
    chosen, logprobs, top = unread.read()
    tokens = chosen.tolist()
    if not plan.guesses:
        return Chosen([tokens[row : row + 1] for row in rows], rows, logprobs, top)
    kept = [keep(c.guess, tokens[row : row + 1 + len(c.guess)]) for c, row in zip(plan.chunks, rows, strict=True)]
    return Chosen(kept, rows, logprobs, top)


def _row(request: Request) -> int:
    assert request.lease is not None
    return request.lease.row


def score_prompts(
    runner: Runner, plan: Plan, trackers: Mapping[Request, Tracker], starts: Sequence[int], hidden: Array
) -> None:
    """Logprobs of prompt tokens: the state at position p says how likely the token at p + 1 was.

    ``starts``: the place of each chunk's first token in ``hidden`` [T, E].
    """
    if all(c.request.score_from is None for c in plan.chunks):
        return
    targets = np.zeros(len(hidden), np.int64)
    temperatures = np.ones(len(hidden), np.float32)
    spans = []
    for chunk, at in zip(plan.chunks, starts, strict=True):
        request = chunk.request
        kept = trackers[request].logprobs
        if request.score_from is None or kept is None or kept.options.start is None:
            continue
        stop = min(chunk.stop, request.prompt_length - 1)
        n = max(0, stop - chunk.start)
        targets[at : at + n] = request.ids[chunk.start + 1 : chunk.start + 1 + n]
        if runner.programs.processed and not request.sampling.greedy:
            temperatures[at : at + n] = request.sampling.temperature
        spans.append((chunk.start, n, at, kept))
    k = max((kept.options.top for *_, kept in spans), default=0)
    chosen, values, ids = runner.score(hidden, targets, k, temperatures)
    for start, n, at, kept in spans:
        kept.prompt[start + 1 : start + 1 + n] = chosen[at : at + n]
        top = kept.options.top
        if top:
            kept.prompt_top[start + 1 : start + 1 + n] = values[at : at + n, :top]
            kept.prompt_top_ids[start + 1 : start + 1 + n] = ids[at : at + n, :top]
