"""What running takes beside weights and KV cache: the compiler says it, from shapes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rootcellar.cache import Kind
from rootcellar.plan.sizing import ARENA
from rootcellar.pools import Layout
from rootcellar.runner import sampler
from rootcellar.runner.batch import Shapes
from rootcellar.runner.placement import Placement
from rootcellar.runner.runner import compiled_step, scorer


@dataclass(frozen=True)
class Programs:
    """What a reserve is measured for: the model's placement and dtype, its kinds and layouts, and the steps' shapes.

    ``table_width``: pages in a row of a page table. ``arena``: the kinds that share one pool, whose pages have
    ``arena_layers`` layers.
    """

    placement: Placement
    dtype: jnp.dtype
    kinds: Sequence[Kind]
    layouts: Mapping[str, Layout]
    backend: str
    shapes: Shapes
    page_size: int
    table_width: int
    arena: tuple[str, ...] = ()
    arena_layers: int = 0

    @property
    def pool_of(self) -> dict[str, str]:
        """The name of the pool that each kind's layers lie in: its own, or the arena."""
        return {kind.name: ARENA if kind.name in self.arena else kind.name for kind in self.kinds}

    @property
    def pools(self) -> dict[str, tuple[Layout, int]]:
        """Each pool's layout and how many layers it has."""
        pools = {}
        for kind in self.kinds:
            shared = kind.name in self.arena
            layers = self.arena_layers if shared else len(kind.layers)
            pools[ARENA if shared else kind.name] = (self.layouts[kind.name], layers)
        return pools

    @property
    def widths(self) -> dict[str, int]:
        """Entries in a row of each kind's page table: a recurrent kind has a state to read and one to write."""
        return {kind.name: 2 if kind.rule == "recurrent" else self.table_width for kind in self.kinds}


def weight_bytes(placement: Placement, dtype: Any) -> int:
    """Bytes of the weights on one device, as they will be placed."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(placement.abstract(dtype))
    )


def reserve_bytes(programs: Programs) -> dict[str, int]:
    """Bytes on one device that the largest programs need beside weights and pools, by name. Compiles them.

    ``prefill`` and ``decode``: temporaries and results of the largest step of each; ``sample``: choosing the tokens of
    the largest batch, with penalties and biases; ``score``: logprobs of a prompt's tokens. A step and the sampling or
    scoring after it may be in flight together.
    """
    largest = {tile: tiles for tiles, tile in programs.shapes.all()}  # shapes come in growing order
    decode, prefill = largest[1], largest[programs.shapes.tile]
    step = compiled_step(programs.placement, programs.kinds, programs.backend, programs.pool_of)
    return {
        "prefill": _beside(step.lower(*_arguments(programs, prefill, programs.shapes.tile))),
        "decode": _beside(step.lower(*_arguments(programs, decode, 1))),
        "sample": _sampling(max(decode, prefill), programs.placement.served.vocab_size),
        "score": _scoring(programs, prefill * programs.shapes.tile),
    }


def _arguments(programs: Programs, tiles: int, tile: int) -> tuple[Any, ...]:
    """The arguments of a step as shapes. The pools are small: a step's memory does not depend on theirs."""
    placement, pages = programs.placement, programs.table_width + 1
    buffers = {}
    for name, (layout, layers) in programs.pools.items():
        placed = zip(layout.arrays(pages, programs.page_size), placement.pool_shardings(layout), strict=True)
        of_layer = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=at) for array, at in placed]
        buffers[name] = of_layer * layers
    ints = jax.ShapeDtypeStruct((tiles * tile,), jnp.int32)
    rows = jax.ShapeDtypeStruct((tiles,), jnp.int32)
    tables = {name: jax.ShapeDtypeStruct((tiles, width), jnp.int32) for name, width in programs.widths.items()}
    return placement.abstract(programs.dtype), buffers, ints, ints, rows, tables, rows


def _sampling(rows: int, vocab: int) -> int:
    scores = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
    adjusted = sampler.every_program(rows, vocab)[-1]
    settings = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), adjusted)
    lowered = jax.jit(sampler.sample).lower(scores, settings)
    return _beside(lowered) + sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(settings))


def _scoring(programs: Programs, tokens: int) -> int:
    cfg = programs.placement.served
    hidden = jax.ShapeDtypeStruct((tokens, cfg.hidden_size), programs.dtype)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return _beside(scorer(cfg).lower(programs.placement.abstract(programs.dtype), hidden, targets, 0))


def _beside(lowered: Any) -> int:
    """Bytes of temporaries and of results that are no donated argument."""
    analysis = lowered.compile().memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
