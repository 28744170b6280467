"""Running batches: compiled programs, weights and pools put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.errors import EngineError
from rootcellar.models.kinds import Paging
from rootcellar.models.spec import Params
from rootcellar.pools import Pool
from rootcellar.pools.copying import Copier, copier
from rootcellar.runner import sampler
from rootcellar.runner.batch import Batch, Given, Newest, Shapes
from rootcellar.runner.placement import Placement
from rootcellar.runner.programs import Programs

# Prefill shapes that a first request needs: 1, 2 and 4 tiles hold a short prompt, or a question after a cached one.
_SHORT = 3
# Of sampler.PROGRAMS those that most requests take: greedy and drawn.
_USUAL = (0, 1)


@dataclass(frozen=True)
class Program:
    """A program to compile: its name for people, whether a first request needs it, and what compiles it."""

    name: str
    first: bool
    run: Callable[[], object]


@dataclass(frozen=True)
class Unread:
    """What :meth:`Runner.sample` chose, on the device: the host goes on, and waits for it when it reads.

    Attributes:
        tokens, logprobs: int32 [N] and float32 [N], of each row.
        newest: int32 [shapes.newest], the tokens once more, for the step that comes after.
        top: logprobs and ids [N, programs.likeliest] of the likeliest tokens; None: nobody asked.
        k: how many of those were asked for.
    """

    tokens: Array
    logprobs: Array
    newest: Array
    top: tuple[Array, Array] | None
    k: int

    def read(self) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """Wait for it.

        Returns:
            tokens int32 [N] and their logprobs float32 [N]; then logprobs and ids [N, k] of the likeliest, best first.
        """
        tokens, logprobs, top = jax.device_get((self.tokens, self.logprobs, self.top))
        return tokens, logprobs, None if top is None else (top[0][:, : self.k], top[1][:, : self.k])


def pools_of(paging: Paging, placement: Placement, pages: Mapping[str, int], spare: int = 0) -> dict[str, Pool]:
    """The pools that a model's kinds lie in, allocated, with so many ``pages`` each, by name.

    ``spare``: states that recurrent ones have beside those.
    """
    states = {paging.pool_of[kind.name] for kind in paging.kinds if kind.rule == "recurrent"}
    return {
        name: Pool(layout, layers, pages[name], placement.pool_shardings(layout), spare if name in states else 0)
        for name, (layout, layers) in paging.pools.items()
    }


class Runner:
    """Runs batches: ``programs`` over ``params``, placed as they say, and ``pools`` by name (``pools_of``).

    Programs are compiled when a shape first runs, or when one of :meth:`each_program` is run; later steps compile
    nothing. Weights and pools may be replaced between two steps.
    """

    def __init__(self, programs: Programs, params: Params, pools: Mapping[str, Pool]) -> None:
        self.programs = programs
        self.params = params
        self.pools = pools
        self._nothing = self.placement.put(np.zeros(programs.shapes.newest, np.int32), self.placement.whole)

    @property
    def placement(self) -> Placement:
        """Where weights and pools lie."""
        return self.programs.placement

    @property
    def shapes(self) -> Shapes:
        """The shapes that a step may have."""
        return self.programs.shapes

    @property
    def pool_of(self) -> Mapping[str, str]:
        """The name of the pool that each kind lies in."""
        return self.programs.paging.pool_of

    @cached_property
    def spare(self) -> dict[str, int]:
        """Of each kind whose pool has spare pages the first: where a step leaves the states after guessed tokens."""
        pools = {kind: self.pools[name] for kind, name in self.pool_of.items()}
        return {kind: pool.pages + 1 for kind, pool in pools.items() if pool.spare}

    @cached_property
    def copiers(self) -> dict[str, Copier]:
        """What copies pages of each pool to host memory and back."""
        copies = self.programs.copies
        return {name: copier(pool, copies[name]) for name, pool in self.pools.items()}

    def kind_in(self, pool: str) -> str:
        """A kind whose layers lie in the pool of this name."""
        return next(kind for kind, name in self.pool_of.items() if name == pool)

    def step(self, batch: Batch, before: Unread | None = None) -> tuple[Array, Array]:
        """Run ``batch``: write its keys and values, and give ``(logits float32 [tiles, V], hidden [T, E])``.

        Row i of ``logits`` belongs to the last token of part i. Both stay on the device. ``before``: what the step gave
        that ``batch.sources`` refer to. ``EngineError`` for a token that is not in the vocabulary and has no vector.
        """
        buffers, scores, hidden = self.programs.step(*self.arguments(batch, before))
        for name, pool in self.pools.items():
            pool.buffers = buffers[name]
        return scores, hidden

    def arguments(self, batch: Batch, before: Unread | None = None) -> tuple[object, ...]:
        """The arguments of the compiled step for ``batch``."""
        tokens = self._nothing if before is None else before.newest
        newest = None if batch.sources is None else Newest(tokens, batch.sources)
        buffers = {name: pool.buffers for name, pool in self.pools.items()}
        known = self._within_vocabulary(batch.tokens)
        fixed = batch.positions, batch.rows, batch.tables, batch.last, batch.given
        places = batch.places
        if places is None and (axes := self.placement.served.axes):  # of text they are its positions
            places = np.tile(np.maximum(batch.positions, 0), (axes, 1))
        return self.params, buffers, known, *fixed, newest, places

    def settle(self, batch: Batch, rows: Sequence[tuple[int, int]]) -> None:
        """Let the state after one row of a batch be that of another, for each of these pairs: (row, other row).

        For rows of which some guessed tokens that follow them were right: their state is that after the last of these.
        """
        if not rows:
            return
        slots = np.zeros((2, self.shapes.newest), np.int32)
        for kind in self.spare:
            pool, written = self.pools[self.pool_of[kind]], batch.tables[kind][:, 1]
            for i, (row, other) in enumerate(rows):
                slots[:, i] = written[other], written[row]
            pool.buffers = self.programs.settle(pool.buffers, np.int32(len(rows)), *slots)

    def _within_vocabulary(self, tokens: NDArray[np.int64]) -> NDArray[np.int32]:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab:
            strange = low if low < 0 else high
            raise EngineError(f"token {strange} is not in the vocabulary of {self._vocab}, and no vector stands for it")
        return tokens.astype(np.int32)

    @property
    def _vocab(self) -> int:
        return self.placement.served.vocab_size

    def temporary_bytes(self, batch: Batch) -> int:
        """Bytes that the compiled step for this shape needs beside its arguments and results. Compiles."""
        analysis = self.programs.step.lower(*self.arguments(batch)).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)

    def sample(self, scores: Array, rows: Sequence[sampler.Sampled], k: int = 0) -> Unread:
        """Choose tokens for each of ``rows`` from the rows of ``scores`` [N, V], and find the ``k`` likeliest of each.

        ``k``: at most ``programs.likeliest``, here and in :meth:`score`. Waits for nothing.
        """
        settings = sampler.build(rows, scores.shape[0], self._vocab)
        chosen = self.programs.sample(scores, settings)
        top = self.programs.top(scores, settings if self.programs.processed else None) if k else None
        return Unread(*chosen, top, k)

    def score(
        self, hidden: Array, targets: NDArray[np.integer], k: int, temperatures: NDArray[np.float32] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logprobs of ``targets`` [T] under hidden states [T, E], and of the ``k`` likeliest tokens.

        ``temperatures`` [T]: those of the distribution at these temperatures; None: of the model's own.

        Returns:
            logprobs float32 [T], NaN for targets that are not in the vocabulary; values float32 [T, k] and ids
            int32 [T, k], best first.
        """
        known = (targets >= 0) & (targets < self._vocab)
        wanted = np.where(known, targets, 0).astype(np.int32)
        divisors = np.ones(len(wanted), np.float32) if temperatures is None else temperatures
        chosen, values, ids = jax.device_get(self.programs.score(self.params, hidden, wanted, divisors))
        return np.where(known, chosen, np.float32("nan")), values[:, :k], ids[:, :k]

    def each_program(self) -> list[Program]:
        """Every program that a step may need, those first that a short request needs alone, greedy or drawn.

        They compile by running on padding, which touches no page that a request may own.
        """
        prefill = [shape for shape in self.shapes.all() if shape[1] > 1]
        decode = [shape for shape in self.shapes.all() if shape[1] == 1]
        short = [*decode[:1], *prefill[:_SHORT]]
        order = [*short, *prefill[_SHORT:], *decode[1:]]
        sampled: dict[int, tuple[int, int]] = {}  # sampling knows a step by its number of tiles alone
        found: list[Program] = []
        for shape in order:
            found.append(Program(_name(*shape), shape in short, functools.partial(self._run_padding, *shape)))
            if sampled.setdefault(shape[0], shape) == shape:
                found += [self._sampling(shape, which, first=shape in short) for which in _USUAL]
        rest = [which for which in range(len(sampler.PROGRAMS)) if which not in _USUAL]
        shapes = [sampled[tiles] for tiles in sorted(sampled)]
        found += [self._sampling(shape, which, first=False) for which in rest for shape in shapes]
        if self.programs.likeliest:
            which_of = range(len(sampler.PROGRAMS) if self.programs.processed else 1)
            found += [self._likeliest(shape, which) for which in which_of for shape in shapes]
        if (encoder := self.placement.served.encoder) is not None:
            found += [self._seeing(shape, encoder.atomic) for shape in prefill]
        scored = {tiles * tile: (tiles, tile) for tiles, tile in order}  # scoring knows a step by its tokens alone
        found += [Program("settling states", False, self._settle_padding)] if self.spare else []
        return found + [self._scoring(scored[tokens]) for tokens in sorted(scored)]

    def _seeing(self, shape: tuple[int, int], atomic: bool) -> Program:
        """A step in which some vectors stand for tokens."""

        def run() -> None:
            batch = Batch.padding(*shape, self.programs.widths)
            size = len(batch.tokens)
            vectors = np.zeros((size, self.placement.served.hidden_size), np.float32)
            given = Given(np.zeros(size, np.bool_), vectors, batch.positions if atomic else None)
            jax.block_until_ready(self.step(replace(batch, given=given)))

        return Program(f"{_name(*shape)} with images", False, run)

    def _sampling(self, shape: tuple[int, int], which: int, *, first: bool) -> Program:
        def run() -> None:
            settings = sampler.every_program(shape[0], self._vocab)[which]
            scores, _ = self._run_padding(*shape)
            jax.block_until_ready(self.programs.sample(scores, settings))

        return Program(f"sampling for {shape[0]}, {sampler.PROGRAMS[which]}", first, run)

    def _likeliest(self, shape: tuple[int, int], which: int) -> Program:
        def run() -> None:
            settings = sampler.every_program(shape[0], self._vocab)[which]
            jax.block_until_ready(self.programs.top(self._run_padding(*shape)[0], settings))

        name = f"the likeliest tokens for {shape[0]}"
        return Program(f"{name}, {sampler.PROGRAMS[which]}" if self.programs.processed else name, False, run)

    def _scoring(self, shape: tuple[int, int]) -> Program:
        def run() -> None:
            _, hidden = self._run_padding(*shape)
            self.score(hidden, np.zeros(len(hidden), np.int64), 0)

        return Program(f"logprobs of {shape[0] * shape[1]} prompt tokens", False, run)

    def _settle_padding(self) -> None:
        self.settle(Batch.padding(1, 1, self.programs.widths), [(0, 0)])

    def _run_padding(self, tiles: int, tile: int) -> tuple[Array, Array]:
        """The logits and hidden states of a step in which no token belongs to anybody."""
        return jax.block_until_ready(self.step(Batch.padding(tiles, tile, self.programs.widths)))


def _name(tiles: int, tile: int) -> str:
    return f"prefill of {tiles * tile} tokens" if tile > 1 else f"decoding for {tiles}"
