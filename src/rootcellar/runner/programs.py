"""What is compiled for a model: one step over a packed batch, with the pools donated, and what follows a step.

Donation is what makes one buffer serve every step: XLA writes the new keys and values in place and gives the same
memory back. Dataflow orders a step's reads before the next step's writes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rootcellar.models.decoder import embed, logits, through_layers
from rootcellar.models.forward_batch import ForwardBatch
from rootcellar.models.kinds import EXPERTS, Paging
from rootcellar.models.model import ModelConfig
from rootcellar.models.spec import Params
from rootcellar.ops.backends import xla
from rootcellar.plan.sizing import SCORED_TOKENS
from rootcellar.pools.images import image_bytes
from rootcellar.runner import sampler
from rootcellar.runner.batch import Shapes
from rootcellar.runner.placement import Placement

_IN_LITTLE_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""For steps that write out packed weights: XLA for CPUs would do so for all layers before anything else."""


@dataclass(frozen=True)
class Programs:
    """What runs: a model's placement and dtype, how its cache is paged, the attention backend, and the steps' shapes.

    ``table_width``: pages in a row of a page table. ``max_logprobs``: so many of the likeliest tokens are found when
    any are asked for, so that there is one program for all. ``processed``: logprobs are those of the distribution that
    tokens are drawn from. The functions are jitted: they compile for a shape when it first runs.
    """

    placement: Placement
    dtype: jnp.dtype
    paging: Paging
    backend: str
    shapes: Shapes
    table_width: int
    max_logprobs: int
    processed: bool = False

    @property
    def likeliest(self) -> int:
        """How many of the likeliest tokens are found: ``max_logprobs``, or all of a smaller vocabulary."""
        return min(self.max_logprobs, self.placement.served.vocab_size)

    @property
    def widths(self) -> dict[str, int]:
        """Entries in a row of each kind's page table: a recurrent kind has a state to read and one to write."""
        return {kind.name: 2 if kind.rule == "recurrent" else self.table_width for kind in self.paging.kinds}

    @property
    def copies(self) -> dict[str, int]:
        """How often each KV head of the layers of a pool is repeated on the devices, by the pool's name."""
        return {name: self.placement.copies(layers) for name, layers in self.paging.lying_in.items()}

    @property
    def image_bytes(self) -> dict[str, int]:
        """Bytes of a page of each pool away from the devices."""
        copies = self.copies
        return {name: image_bytes(*stored, copies[name]) for name, stored in self.paging.pools.items()}

    @cached_property
    def settle(self) -> Any:
        """Copies states in their pools: ``(buffers of each layer, how many, from slots, to slots) -> buffers``.

        ``buffers`` is donated; there are ``shapes.newest`` slots of either, of which the first count.
        """

        def settle(layers: list[tuple[Array, ...]], count: Array, sources: Array, targets: Array) -> Any:
            def one(i: Array, layers: Any) -> Any:
                def copy(pool: Array) -> Array:
                    state = jax.lax.dynamic_index_in_dim(pool, sources[i], keepdims=False)
                    return jax.lax.dynamic_update_index_in_dim(pool, state, targets[i], 0)

                return jax.tree.map(copy, layers)

            return jax.lax.fori_loop(0, count, one, layers)

        return jax.jit(settle, donate_argnums=0)

    @cached_property
    def step(self) -> Any:
        """One batch through the model: ``(buffers, logits [tiles, V] of each part's end, hidden [T, E])``.

        Arguments: params as placed; ``{pool: buffers of each layer}``, donated; then what a ``Batch`` holds.
        """
        return compiled_step(self.placement, self.paging, self.backend, verifies=self.shapes.guessed > 0)

    @cached_property
    def sample(self) -> Any:
        """:func:`sampler.sample`, and its tokens once more, cut or padded to ``shapes.newest``, for the next step.

        These are in one shape and one place whatever was sampled: steps compile for no other.
        """
        size, where = self.shapes.newest, self.placement.whole

        def choose(scores: Array, settings: sampler.SamplingBatch | None) -> tuple[Array, Array, Array]:
            n = len(scores)
            scores, settings = self._padded((scores, settings))
            chosen = sampler.sample(scores, settings, processed=self.processed)
            tokens, logprobs = (each[:n] for each in chosen)
            return tokens, logprobs, jnp.pad(tokens, (0, max(0, size - len(tokens))))[:size]

        return jax.jit(choose, out_shardings=(self.placement.read_from, self.placement.read_from, where))

    def _padded(self, rows: Any) -> Any:
        return jax.tree.map(sampler.padded, rows) if self.placement.fixed else rows

    @cached_property
    def top(self) -> Any:
        """:func:`sampler.top_logprobs` of the likeliest tokens: scores, and settings where these are ``processed``."""

        def top(scores: Array, settings: sampler.SamplingBatch | None) -> tuple[Array, Array]:
            n = len(scores)
            scores, settings = self._padded((scores, settings))
            values, ids = sampler.top_logprobs(scores, self.likeliest, settings)
            return values[:n], ids[:n]

        return jax.jit(top, out_shardings=self.placement.read_from)

    @cached_property
    def score(self) -> Any:
        """Logprobs of given tokens, and the likeliest: params, hidden states [T, E], targets int32 [T], and what scores
        are divided by, float32 [T].
        """  # fmt: skip
        score = functools.partial(_score, self.placement.served, self.likeliest)
        return jax.jit(score, out_shardings=self.placement.read_from)


def compiled_step(placement: Placement, paging: Paging, backend: str, *, verifies: bool = False) -> Any:
    """The jitted step of a model over its pools; see ``Programs.step``. ``verifies``: see ``ForwardBatch``.

    Layer ``i`` of a kind has the buffers of its pool's layer ``i``, whoever else shares them.
    """
    cfg, pool_of = placement.served, paging.pool_of
    attended = [kind for kind in paging.kinds if kind.name != EXPERTS]
    where = {layer: (kind.name, i) for kind in attended for i, layer in enumerate(kind.layers)}

    def step(params, buffers, tokens, positions, rows, tables, last, given, newest, places):  # type: ignore[no-untyped-def]
        buffers = {name: list(layers) for name, layers in buffers.items()}
        until = None if given is None else given.until
        steps = {
            name: ForwardBatch(positions, rows, tables[name], layout, backend, placement.local, places, until, verifies)
            for name, layout in paging.layouts.items()
        }

        def mix(layer: int, weights: Params, x: Array) -> Array:
            name, i = where[layer]
            held = buffers[pool_of[name]]
            out, new = cfg.layers[layer].mixer.run(weights, x, steps[name], held[i])
            held[i] = tuple(new)
            return out

        if newest is not None:
            tokens = jnp.where(newest.sources >= 0, newest.tokens[newest.sources], tokens)
        x = embed(params, cfg, tokens)
        if given is not None:
            x = jnp.where(given.where[:, None], given.vectors.astype(x.dtype), x)
        chosen: list[Array] = []
        routed = steps.get(EXPERTS)
        hidden = placement.everywhere(through_layers(params, cfg, x, mix, None if routed is None else chosen.append))
        if routed is not None:
            told = placement.everywhere(jnp.stack(chosen, axis=1))
            at = routed.table, routed.rows, routed.positions
            buffers[EXPERTS][0] = xla.write(routed.layout, buffers[EXPERTS][0], (told,), *at)
        scores = placement.by_vocabulary(logits(params, cfg, hidden[last]))
        return buffers, placement.everywhere(scores), hidden

    return jax.jit(step, donate_argnums=1, compiler_options=_IN_LITTLE_MEMORY if placement.writes_out else None)


def _score(
    cfg: ModelConfig, k: int, params: Params, hidden: Array, targets: Array, temperatures: Array
) -> tuple[Array, Array, Array]:
    def part(args: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        states, wanted, divisors = args
        scores = sampler.cooled(logits(params, cfg, states), divisors)  # as tokens are drawn: the same bits
        values, ids = jax.lax.top_k(scores, k) if k else (scores[:, :0], jnp.zeros((scores.shape[0], 0), jnp.int32))
        chosen = jnp.take_along_axis(scores, wanted[:, None], axis=-1)
        found = sampler.logprobs(scores, jnp.concatenate([chosen, values], axis=-1))
        return found[:, 0], found[:, 1:], ids

    size = min(SCORED_TOKENS, hidden.shape[0])
    parts = hidden.shape[0] // size
    rows = targets.reshape(parts, size), temperatures.reshape(parts, size)
    out = jax.lax.map(part, (hidden.reshape(parts, size, -1), *rows))
    return tuple(x.reshape(parts * size, *x.shape[2:]) for x in out)
