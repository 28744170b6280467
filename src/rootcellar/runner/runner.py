"""The compiled step: a packed batch through the model, with the pools donated.

Donation is what makes one buffer serve every step: XLA writes the new keys and values in place and gives the same
memory back. Dataflow orders a step's reads before the next step's writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rootcellar.cache import Kind
from rootcellar.models.decoder import forward, logits
from rootcellar.models.model import ModelConfig
from rootcellar.models.spec import Params
from rootcellar.models.step import Step
from rootcellar.pools import Pool
from rootcellar.runner import sampler
from rootcellar.runner.batch import Batch, Shapes
from rootcellar.runner.placement import Placement

# Positions scored at a time when prompt logprobs are asked for: bounds the memory of [positions, vocabulary].
_SCORED = 64


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


def compiled_step(placement: Placement, kinds: Sequence[Kind], backend: str, pool_of: Mapping[str, str]) -> Any:
    """The jitted step of a model over its pools, which are its second argument and donated.

    Arguments: params as placed, ``{pool: [buffers of each layer]}``, then the arrays of a ``Batch``. ``pool_of``: the
    pool of each kind; layer ``i`` of a kind has the buffers of the pool's layer ``i``, whoever else shares them.
    """
    cfg = placement.served
    where = {layer: (kind.name, i) for kind in kinds for i, layer in enumerate(kind.layers)}
    each = [len(layer.mixer.layout(jnp.dtype(jnp.float32)).axes) for layer in cfg.layers]

    def step(params, buffers, tokens, positions, rows, tables, last):  # type: ignore[no-untyped-def]
        """One batch through the model: (buffers, logits [tiles, V] of each part's end, hidden [T, E])."""
        buffers = {name: list(arrays) for name, arrays in buffers.items()}
        steps = {kind.name: Step(positions, rows, tables[kind.name], backend, placement.local) for kind in kinds}

        def mix(layer: int, weights: Params, x: Array) -> Array:
            name, i = where[layer]
            held = buffers[pool_of[name]]
            own = slice(i * each[layer], (i + 1) * each[layer])
            out, held[own] = cfg.layers[layer].mixer.run(weights, x, steps[name], held[own])
            return out

        hidden = placement.everywhere(forward(params, cfg, tokens, mix))
        scores = placement.by_vocabulary(logits(params, cfg, hidden[last]))
        return buffers, placement.everywhere(scores), hidden

    return jax.jit(step, donate_argnums=1)


def scorer(cfg: ModelConfig) -> Any:
    """The jitted function behind :meth:`Runner.score`: params, hidden states, targets and, static, ``k``."""
    return jax.jit(functools.partial(_score, cfg), static_argnums=3)


class Runner:
    """Runs batches of one model over its pools.

    ``pools`` are by name, ``pool_of`` names that of each kind, ``widths`` the entries in a row of its page table.
    Programs are compiled when a shape first runs, or when one of :meth:`programs` is run; later steps compile nothing.
    """

    def __init__(
        self,
        placement: Placement,
        params: Params,
        kinds: Sequence[Kind],
        pools: dict[str, Pool],
        *,
        backend: str,
        shapes: Shapes,
        widths: Mapping[str, int],
        pool_of: Mapping[str, str],
    ) -> None:
        cfg = self.cfg = placement.served
        self.placement = placement
        self.params = placement.place(params)
        self.pools = pools
        self.shapes = shapes
        self._widths = widths
        self.pool_of = pool_of
        self._step = compiled_step(placement, kinds, backend, pool_of)
        self._sample = jax.jit(sampler.sample)
        self._top = jax.jit(sampler.top_logprobs, static_argnums=1)
        self._score = scorer(cfg)

    def kind_in(self, pool: str) -> str:
        """A kind whose layers lie in the pool of this name."""
        return next(kind for kind, name in self.pool_of.items() if name == pool)

    def step(self, batch: Batch) -> tuple[Array, Array]:
        """Run ``batch``: write its keys and values, and give ``(logits float32 [tiles, V], hidden [T, E])``.

        Row i of ``logits`` belongs to the last token of part i. Both stay on the device.
        """
        buffers, scores, hidden = self._step(*self._arguments(batch))
        for name, pool in self.pools.items():
            pool.buffers = buffers[name]
        return scores, hidden

    def _arguments(self, batch: Batch) -> tuple[object, ...]:
        buffers = {name: pool.buffers for name, pool in self.pools.items()}
        return self.params, buffers, batch.tokens, batch.positions, batch.rows, batch.tables, batch.last

    def temporary_bytes(self, batch: Batch) -> int:
        """Bytes that the compiled step for this shape needs beside its arguments and results. Compiles."""
        analysis = self._step.lower(*self._arguments(batch)).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)

    def sample(self, scores: Array, rows: Sequence[sampler.Sampled]) -> tuple[np.ndarray, np.ndarray]:
        """Choose a token for each of ``rows`` from the rows of ``scores`` [N, V]: (int32 [N], logprob float32 [N])."""
        settings = sampler.build(rows, scores.shape[0], self.cfg.vocab_size)
        tokens, logprobs = jax.device_get(self._sample(scores, settings))
        return tokens, logprobs

    def top_logprobs(self, scores: Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` likeliest tokens of each row of ``scores``: logprobs [N, k] and ids [N, k], best first."""
        values, ids = jax.device_get(self._top(scores, _round_up(k, self.cfg.vocab_size)))
        return values[:, :k], ids[:, :k]

    def score(self, hidden: Array, targets: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logprobs of ``targets`` int32 [T] under hidden states [T, E], and of the ``k`` likeliest tokens.

        Returns:
            logprobs float32 [T]; values float32 [T, k] and ids int32 [T, k], best first.
        """
        width = _round_up(k, self.cfg.vocab_size) if k else 0
        chosen, values, ids = jax.device_get(self._score(self.params, hidden, targets, width))
        return chosen, values[:, :k], ids[:, :k]

    def programs(self) -> list[Program]:
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
        return found + [self._sampling(shape, which, first=False) for which in rest for shape in shapes]

    def _sampling(self, shape: tuple[int, int], which: int, *, first: bool) -> Program:
        def run() -> None:
            settings = sampler.every_program(shape[0], self.cfg.vocab_size)[which]
            jax.block_until_ready(self._sample(self._run_padding(*shape), settings))

        return Program(f"sampling for {shape[0]}, {sampler.PROGRAMS[which]}", first, run)

    def _run_padding(self, tiles: int, tile: int) -> Array:
        """The logits of a step in which no token belongs to anybody."""
        size = tiles * tile
        zeros = np.zeros(tiles, np.int32)
        tables = {name: np.zeros((tiles, width), np.int32) for name, width in self._widths.items()}
        scores, _ = self.step(Batch(np.zeros(size, np.int32), np.full(size, -1, np.int32), zeros, tables, zeros))
        return jax.block_until_ready(scores)


def _name(tiles: int, tile: int) -> str:
    return f"prefill of {tiles * tile} tokens" if tile > 1 else f"decoding for {tiles}"


def _round_up(k: int, vocab: int) -> int:
    return min(1 << (k - 1).bit_length(), vocab)


def _score(cfg: ModelConfig, params: Params, hidden: Array, targets: Array, k: int) -> tuple[Array, Array, Array]:
    def part(args: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        states, wanted = args
        scores = logits(params, cfg, states)
        total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(scores, wanted[:, None], axis=-1) - total
        values, ids = jax.lax.top_k(scores, k) if k else (scores[:, :0], jnp.zeros((scores.shape[0], 0), jnp.int32))
        return chosen[:, 0], values - total, ids

    size = min(_SCORED, hidden.shape[0])
    parts = hidden.shape[0] // size
    out = jax.lax.map(part, (hidden.reshape(parts, size, -1), targets.reshape(parts, size)))
    return tuple(x.reshape(parts * size, *x.shape[2:]) for x in out)
