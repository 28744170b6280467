"""What running takes beside weights and KV cache: the compiler says it, from shapes, before anything is allocated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rootcellar.models.places import device_bytes
from rootcellar.runner import sampler
from rootcellar.runner.batch import Newest
from rootcellar.runner.placement import Placement
from rootcellar.runner.programs import Programs


def weight_bytes(placement: Placement, dtype: Any) -> int:
    """Bytes of the weights on one device, as they will be placed."""
    return sum(map(device_bytes, jax.tree.leaves(placement.abstract(dtype))))


def reserve_bytes(programs: Programs) -> dict[str, int]:
    """Bytes on one device that the largest programs need beside weights and pools, by name. Compiles them.

    ``prefill`` and ``decode``: temporaries and results of the largest step of each; ``sample``: choosing the tokens of
    the largest batch, with penalties and biases; ``score``: logprobs of a prompt's tokens. A step and the sampling or
    scoring after it may be in flight together.
    """
    largest = {tile: tiles for tiles, tile in programs.shapes.all()}  # shapes come in growing order
    decode, prefill = largest[1], largest[programs.shapes.tile]
    step = programs.step
    return {
        "prefill": _beside(step.lower(*arguments(programs, prefill, programs.shapes.tile))),
        "decode": _beside(step.lower(*arguments(programs, decode, 1))),
        "sample": _sampling(programs, max(decode, prefill)),
        "score": _scoring(programs, prefill * programs.shapes.tile),
    }


def arguments(programs: Programs, tiles: int, tile: int) -> tuple[Any, ...]:
    """The arguments of a step as shapes. The pools are small: a step's memory does not depend on theirs."""
    placement, pages = programs.placement, programs.table_width + 1
    buffers = {}
    for name, (layout, layers) in programs.paging.pools.items():
        placed = zip(layout.buffers(pages), placement.pool_shardings(layout), strict=True)
        of_layer = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at) for a, at in placed)
        buffers[name] = [of_layer] * layers
    ints = jax.ShapeDtypeStruct((tiles * tile,), jnp.int32)
    rows = jax.ShapeDtypeStruct((tiles,), jnp.int32)
    tables = {name: jax.ShapeDtypeStruct((tiles, width), jnp.int32) for name, width in programs.widths.items()}
    newest = None
    if tile == 1:
        tokens = jax.ShapeDtypeStruct((programs.shapes.newest,), jnp.int32, sharding=placement.whole)
        newest = Newest(tokens, rows)
    axes = placement.served.axes
    places = jax.ShapeDtypeStruct((axes, tiles * tile), jnp.int32) if axes else None
    return placement.abstract(programs.dtype), buffers, ints, ints, rows, tables, rows, None, newest, places


def _sampling(programs: Programs, rows: int) -> int:
    vocab = programs.placement.served.vocab_size
    scores = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
    adjusted = sampler.every_program(rows, vocab)[-1]
    settings = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), adjusted)
    lowered = programs.sample.lower(scores, settings)
    return _beside(lowered) + sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(settings))


def _scoring(programs: Programs, tokens: int) -> int:
    cfg = programs.placement.served
    hidden = jax.ShapeDtypeStruct((tokens, cfg.hidden_size), programs.dtype)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    divisors = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    return _beside(programs.score.lower(programs.placement.abstract(programs.dtype), hidden, targets, divisors))


def _beside(lowered: Any) -> int:
    """Bytes of temporaries and of results that are no donated argument."""
    analysis = lowered.compile().memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
