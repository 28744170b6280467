"""How large the KV cache becomes, and why: usable bytes, less weights and activations, divided among the kinds.

Sizes are bytes on one device. The division itself is :mod:`rootcellar.plan.sizing`, which the planner uses too. Nothing
is allocated here: weights are counted from their shapes, and activations are asked of the compiler, or bounded from
above where that bound is enough to know that everything fits.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rootcellar.config import EngineConfig
from rootcellar.engine.numbers import numbers
from rootcellar.errors import ConfigError
from rootcellar.models.kinds import paging
from rootcellar.models.params import declare
from rootcellar.models.spec import Params, ParamSpec
from rootcellar.ops import products
from rootcellar.plan.sizing import (
    ARENA,
    MOST_REQUESTS,
    Cost,
    Division,
    Rules,
    Widths,
    activation_bytes,
    divide,
    largest,
    smallest,
    verified,
)
from rootcellar.runner import Placement, Programs, Shapes
from rootcellar.runner.encoding import most_patches
from rootcellar.runner.reserve import reserve_bytes, weight_bytes
from rootcellar.tiers.host import free_memory, host_rows
from rootcellar.units import gb, parse_bytes

log = logging.getLogger(__name__)

# With max_running_requests unset: one request for so many tokens of the cache, within these bounds.
TOKENS_PER_REQUEST = 128
_DEFAULT_SHARE = 2  # of a machine's memory, half


@dataclass(frozen=True)
class Usable:
    """Memory of one device: ``nbytes`` in all, ``others`` of them taken before the engine came; ``how`` it is known."""

    nbytes: int
    others: int
    how: str


@dataclass(frozen=True)
class Sizing:
    """What the sizing came to; see :func:`report` for the words."""

    config: EngineConfig
    usable: Usable
    weights: int
    pictures: int
    reserve: int
    reserve_how: str
    available: int
    costs: tuple[Cost, ...]
    division: Division
    fitting_tokens: int
    capped_by: str | None
    max_running_requests: int
    context_length: int
    devices: int

    @property
    def cell_size(self) -> int:
        """Bytes that one token takes in all layers that keep tokens."""
        return sum(c.page_bytes for c in self.costs if not c.recurrent) // self.config.page_size


def running_requests(config: EngineConfig, tokens: int | None) -> int:
    """``max_running_requests``, or what follows from ``tokens`` of KV cache; None: the most that may follow."""
    if config.max_running_requests is not None:
        return config.max_running_requests
    return MOST_REQUESTS if tokens is None else max(1, min(MOST_REQUESTS, tokens // TOKENS_PER_REQUEST))


def size(config: EngineConfig, programs: Programs, context_length: int, params: Params | None = None) -> Sizing:
    """Decide how large the KV cache becomes, before anything is allocated.

    ``programs`` describes what will run, for the most requests that may (``running_requests``); ``params`` are weights
    that were handed over, and lie in memory already.

    Raises ConfigError when not even the smallest cache, or the ``max_total_tokens`` asked for, fits; the message has
    the numbers, and for each setting that would help the value that fits.
    """
    weights = weight_bytes(programs.placement, programs.dtype)
    usable = usable_memory(config, jax.local_devices()[0], 0 if params is None else weights)
    demand = _Demand(config, programs, usable, weights, loads=params is None)
    wanted, why = _wanted(config, context_length)
    reserve, how, division = _settle(demand, wanted, context_length)
    most = demand.divide(reserve, None)
    sizing = Sizing(
        config=config,
        usable=usable,
        weights=weights,
        pictures=demand.pictures,
        reserve=reserve,
        reserve_how=how,
        available=demand.available(reserve),
        costs=demand.costs,
        division=division,
        fitting_tokens=division.tokens if most is None else max(most.tokens, division.tokens),
        capped_by=why if wanted is not None and wanted - division.tokens < config.page_size else None,
        max_running_requests=running_requests(config, division.tokens),
        context_length=context_length,
        devices=config.tp_size,
    )
    log.info(
        "Memory profiling: available_kv_cache=%s GB, max_tokens=%d, cell_size=%d bytes",
        gb(sizing.available), sizing.fitting_tokens, sizing.cell_size,
    )  # fmt: skip
    log.info("max_total_num_tokens: %d", division.tokens)
    return sizing


def size_host(sizing: Sizing, programs: Programs, *, loads: bool) -> dict[str, int]:
    """Pages of each pool in host memory, decided before anything is allocated.

    ``loads``: whether weights will be read, and do not lie in memory already.

    Raises ConfigError where so much will not be free; the message has the figures, and what would fit.
    """
    config, free = sizing.config, free_memory()
    if jax.default_backend() == "cpu":  # whose own memory is the host's
        here = config.tp_size // jax.process_count()
        free -= here * (sizing.division.nbytes + sizing.weights * loads)
    return host_rows(
        sizing.division.pages,
        programs.image_bytes,
        ratio=config.hicache_ratio,
        size=config.hicache_size,
        fraction=config.hicache_host_memory_fraction,
        free=max(0, free),
    )


def _wanted(config: EngineConfig, context_length: int) -> tuple[int | None, str]:
    """The tokens to take although more may fit, and why; None: all that fit."""
    if config.max_total_tokens is not None:
        return config.max_total_tokens, "max_total_tokens"
    if jax.default_backend() == "cpu" and config.max_running_requests is None:
        # A CPU's memory is everybody's: a small model must not zero gigabytes that nobody asked for.
        pages = -(-MOST_REQUESTS * context_length // config.page_size)
        return pages * config.page_size, f"{MOST_REQUESTS} requests of context_length={context_length}"
    return None, ""


def _settle(demand: _Demand, wanted: int | None, context_length: int) -> tuple[int, str, Division]:
    """The reserve, how it is known, and the pools. Measures only where a bound does not settle that all fits."""
    if wanted is not None:
        reserve = estimate_reserve(demand.programs)
        division = demand.divide(reserve, wanted)
        if division is not None:
            return reserve, "bounded from above by the shapes: it fits without measuring", division
    reserve, how = _measure(demand.programs)
    division = demand.divide(reserve, demand.config.max_total_tokens)
    if division is None:
        raise ConfigError(_refusal(demand, reserve, context_length))
    if wanted is not None and division.tokens > wanted:
        division = demand.divide(reserve, wanted) or division
    return reserve, how, division


# --- what there is ----------------------------------------------------------------------------------------------------


def usable_memory(config: EngineConfig, device: jax.Device, ours: int) -> Usable:
    """The memory of one device, from ``device_memory``, the device itself, or the machine (CPU).

    ``ours``: bytes of weights that were handed over and lie on the device already.
    """
    wanted = None if config.device_memory is None else parse_bytes(config.device_memory, "device_memory")
    said = f"device_memory={config.device_memory}"
    if device.platform == "cpu":  # it keeps no statistics, and virtual devices share one memory
        total = machine_memory() // _DEFAULT_SHARE if wanted is None else wanted
        how = "half of the machine's memory" if wanted is None else said
        shared = f", shared by {config.tp_size} devices" if config.tp_size > 1 else ""
        return Usable(total // config.tp_size, 0, how + shared)
    stats = device.memory_stats()
    if stats is None or "bytes_limit" not in stats:
        if wanted is None:
            raise ConfigError(f"{device} does not say how much memory it has: set device_memory, as '16GB'")
        return Usable(wanted, 0, said)
    others = max(0, int(stats["bytes_in_use"]) - ours)
    limit = int(stats["bytes_limit"])
    if wanted is not None and wanted < limit:
        return Usable(wanted, others, said)
    return Usable(limit, others, f"what {device} lets JAX use")


def machine_memory() -> int:
    """Bytes of memory that this process may use at most: the machine's, or the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


# --- what is needed ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Demand:
    """What must fit into what."""

    config: EngineConfig
    programs: Programs
    usable: Usable
    weights: int
    loads: bool
    """Whether weights are read, and not handed over as they are."""

    @property
    def costs(self) -> tuple[Cost, ...]:
        """Bytes of a page of each kind on one device, in all layers of its pool, as the pools will shard it."""
        costs = []
        pools, pool_of = self.programs.paging.pools, self.programs.paging.pool_of
        for kind in self.programs.paging.kinds:
            layout, layers = pools[pool_of[kind.name]]
            costs.append(Cost(kind, layers * self.programs.placement.page_bytes(layout)))
        return tuple(costs)

    def rules(self, max_total_tokens: int | None) -> Rules:
        """The settings that divide the budget."""
        config = self.config
        return Rules(
            config.page_size,
            config.swa_full_tokens_ratio,
            config.mamba_full_memory_ratio,
            max_total_tokens,
            inflight=config.chunked_prefill_size,
            max_mamba_cache_size=config.max_mamba_cache_size,
            running=running_requests(config, max_total_tokens),
            arena=self.programs.paging.arena,
            spare_states=self.spare_states(max_total_tokens),
        )

    def spare_states(self, max_total_tokens: int | None) -> int:
        """States of each recurrent kind for tokens that a step guesses, beside the cache's."""
        guessed = self.programs.shapes.guessed
        if not guessed or not any(kind.rule == "recurrent" for kind in self.programs.paging.kinds):
            return 0
        return verified(running_requests(self.config, max_total_tokens), guessed) - 1

    def available(self, reserve: int) -> int:
        """Bytes for the KV cache; less than nothing when weights and reserve alone are too much."""
        limit = int(self.usable.nbytes * self.config.mem_fraction_static)
        return limit - self.usable.others - self.weights - self.pictures - reserve

    def divide(self, reserve: int, max_total_tokens: int | None) -> Division | None:
        """The pools, or None when they do not fit."""
        return divide(self.costs, self.rules(max_total_tokens), self.available(reserve))

    def needed(self, reserve: int) -> int:
        """Bytes that the smallest cache that was asked for takes, everything included."""
        least = smallest(self.costs, self.rules(self.config.max_total_tokens))
        return self.usable.others + self.weights + self.pictures + reserve + least

    @property
    def pictures(self) -> int:
        """See :func:`picture_bytes`."""
        return picture_bytes(self.config, self.programs)


def picture_bytes(config: EngineConfig, programs: Programs) -> int:
    """Bytes for what an encoder of pictures makes and needs: what is kept, and the most that encoding takes at a time.

    An upper bound from shapes alone, of as many patches as are encoded together. Float32 inside.
    """
    encoder = programs.placement.served.encoder
    return 0 if encoder is None else config.mm_cache_size * 2**20 + 4 * encoder.workspace(most_patches(encoder))


def _measure(programs: Programs) -> tuple[int, str]:
    """The reserve, asked of the compiler, and how it came about."""
    parts = reserve_bytes(programs)
    how = ", ".join(f"{name} {nbytes}" for name, nbytes in parts.items())
    return (
        max(parts["prefill"], parts["decode"]) + max(parts["sample"], parts["score"]),
        f"measured from the compiled programs, in bytes: {how}; the larger step and the larger of what follows it",
    )


def estimate_reserve(programs: Programs) -> int:
    """An upper bound, in bytes, of what the programs need beside weights and KV cache, from shapes alone."""
    model, shapes = programs.placement.served, programs.shapes
    sizes = shapes.all()
    prefill, rows = max(tiles for tiles, tile in sizes if tile == shapes.tile), max(t for t, tile in sizes if tile == 1)
    # The widest of each: a bound, whichever layer is the widest.
    heads, kv_heads, head_dim = (max(w) for w in zip(*(layer.mixer.widths for layer in model.layers), strict=True))
    feed_forwards = [layer.feed_forward for layer in model.layers]
    widths = Widths(
        hidden=model.hidden_size,
        intermediate=max((f.width(model.hidden_size) for f in feed_forwards if f is not None), default=0),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=model.vocab_size,
    )
    nbytes = activation_bytes(widths, prefill * shapes.tile, prefill, rows)
    placement = programs.placement
    packed, narrow = placement.holding is not None, programs.dtype.itemsize < 4
    if (packed and not placement.native) or (narrow and jax.default_backend() == "cpu"):
        # XLA computes in float32 copies of the weights, of some more than one: up to 1.5 times in all was seen.
        nbytes += 2 * weight_bytes(dataclasses.replace(placement, holding=None), jnp.float32)
    elif packed:
        nbytes += 2 * _written_out(placement, max(prefill * shapes.tile, rows), max(prefill, rows))
    return nbytes


def _written_out(placement: Placement, tokens: int, scored: int) -> int:
    """Bytes of the largest packed weight that XLA writes out, one after the other, where kernels multiply by few rows.

    ``tokens``: of a step; ``scored``: how many of them are multiplied by the head.
    """
    specs = declare(placement.served)
    layers, ends = specs.pop("layers"), specs
    multiplied: list[ParamSpec] = jax.tree.leaves(
        [part for part, rows in ((layers, tokens), (ends, scored)) if rows >= products.many()]
    )
    return max((math.prod(spec.shape) for spec in multiplied if spec.inputs), default=0) * 4


# --- when it does not fit ---------------------------------------------------------------------------------------------


def _refusal(demand: _Demand, reserve: int, context_length: int) -> str:
    """The message: what was needed, what there is, and each change that would be enough by itself."""
    usable, config = demand.usable, demand.config
    asked = "one page of KV cache" if config.max_total_tokens is None else f"max_total_tokens={config.max_total_tokens}"
    least = smallest(demand.costs, demand.rules(config.max_total_tokens))
    others = f" {gb(usable.others)} GB are taken already," if usable.others else ""
    images = f"images {gb(demand.pictures)} GB (mm_cache_size, and encoding), " if demand.pictures else ""
    text = (
        "Not enough memory. Please try to increase --mem-fraction-static. "
        f"{gb(usable.nbytes)} GB are usable ({usable.how}), times mem_fraction_static={config.mem_fraction_static:g};"
        f"{others} weights take {gb(demand.weights)} GB, {images}activations {gb(reserve)} GB, "
        f"and {asked} takes {gb(least)} GB: {gb(demand.needed(reserve))} GB in all. "
    )
    remedies = list(_remedies(demand, reserve, context_length))
    if not remedies:
        return text + "No single setting is enough: use a smaller model, more devices or more memory."
    return text + "Any one of these would fit: " + "; ".join(remedies) + "."


def _remedies(demand: _Demand, reserve: int, context_length: int) -> Iterator[str]:
    config, usable = demand.config, demand.usable
    fraction = math.ceil(100 * demand.needed(reserve) / usable.nbytes) / 100
    if fraction <= 1:
        yield f"mem_fraction_static={fraction:g}"
    if jax.default_backend() == "cpu":
        megabytes = math.ceil(demand.needed(reserve) * config.tp_size / config.mem_fraction_static / 1e6) + 1
        if megabytes * 10**6 < machine_memory():
            enough = f"{megabytes}MB" if megabytes < 1000 else f"{-(-megabytes // 100) / 10:g}GB"
            yield f"device_memory={enough!r}"
    if config.max_total_tokens is not None:
        most = demand.divide(reserve, None)
        if most is not None:
            context = f" (with context_length={most.tokens})" if most.tokens < context_length else ""
            yield f"max_total_tokens={most.tokens}{context}"
    yield from _narrower(demand, reserve)
    yield from _smaller_steps(demand, reserve)


def _narrower(demand: _Demand, reserve: int) -> Iterator[str]:
    """Narrower types, where those are not used already."""
    config = demand.config
    narrow = dataclasses.replace(demand, programs=_held_as(demand.programs, config, "bfloat16"))
    wide = any(now.page_bytes > then.page_bytes for now, then in zip(demand.costs, narrow.costs, strict=True))
    if wide and _fits(narrow, reserve):
        yield "kv_cache_dtype='bfloat16'"
    if config.dtype == "bfloat16" or not demand.loads:
        return
    types = numbers(dataclasses.replace(config, dtype="bfloat16"), demand.programs.placement.model, loads=True)
    placement = dataclasses.replace(demand.programs.placement, holding=types.holding)
    cast = dataclasses.replace(_held_as(demand.programs, config, types.kv), placement=placement, dtype=types.computed)
    weights = weight_bytes(cast.placement, cast.dtype)
    if _fits(dataclasses.replace(demand, programs=cast, weights=weights), estimate_reserve(cast)):
        yield "dtype='bfloat16'"


def _held_as(programs: Programs, config: EngineConfig, kv_dtype: str) -> Programs:
    """The programs over a cache of ``kv_dtype``."""
    pages = paging(
        programs.placement.served,
        kv_dtype,
        config.page_size,
        arena=bool(programs.paging.arena),
        experts=config.enable_return_routed_experts,
    )
    return dataclasses.replace(programs, paging=pages)


def _smaller_steps(demand: _Demand, reserve: int) -> Iterator[str]:
    """Fewer requests or tokens in a step, where activations are what is too much."""
    chunk, shapes_now = demand.config.chunked_prefill_size, demand.programs.shapes
    running, guessed = shapes_now.decode_rows, shapes_now.guessed

    def fits(shapes: Shapes) -> bool:
        # A smaller step never takes more than the one that was measured.
        bound = min(reserve, estimate_reserve(dataclasses.replace(demand.programs, shapes=shapes)))
        return _fits(demand, bound)

    choices: dict[str, tuple[int, Callable[[int], Shapes]]] = {
        "max_running_requests": (running, lambda n: Shapes.of(chunk, n, guessed)),
        "chunked_prefill_size": (chunk, lambda n: Shapes.of(n, running, guessed)),
    }
    for name, (now, shapes_of) in choices.items():
        if now > 1 and fits(shapes_of(1)):
            yield f"{name}={largest(lambda n, of=shapes_of: fits(of(n)), 1, now - 1)}"  # type: ignore[misc]


def _fits(demand: _Demand, reserve: int) -> bool:
    return demand.divide(reserve, demand.config.max_total_tokens) is not None


# --- the report -------------------------------------------------------------------------------------------------------


def report(sizing: Sizing) -> dict[str, Any]:
    """Every figure of the sizing by name, and under ``"derivation"`` how each came about. Bytes are of one device."""
    config, division = sizing.config, sizing.division
    page = config.page_size
    costs = {c.kind.name if c.kind.name in division.pages else ARENA: c for c in sizing.costs}
    pools = {
        name: {"tokens": division.pages[name] * (1 if c.recurrent else page),
               "bytes": (division.pages[name] + 1 + (division.spare_states if c.recurrent else 0)) * c.page_bytes}
        for name, c in costs.items()
    }  # fmt: skip
    figures: dict[str, tuple[Any, str]] = {
        "usable_bytes": (sizing.usable.nbytes, sizing.usable.how),
        "other_bytes": (sizing.usable.others, "in use on the device before the engine came, weights handed over apart"),
        "mem_fraction_static": (config.mem_fraction_static, "setting"),
        "weight_bytes": (sizing.weights, f"shapes of the parameters x dtype, as placed on {sizing.devices} device(s)"),
        "image_bytes": (sizing.pictures, "mm_cache_size, and the most that encoding takes, if the model knows images"),
        "activation_reserve_bytes": (sizing.reserve, sizing.reserve_how),
        "available_kv_cache_bytes": (
            sizing.available,
            f"{sizing.usable.nbytes} x {config.mem_fraction_static:g} - {sizing.usable.others} - {sizing.weights} - "
            f"{sizing.pictures} - {sizing.reserve}",
        ),
        "cell_size_bytes": (sizing.cell_size, "bytes of one token in all layers: " + _cells(sizing)),
        "max_tokens": (sizing.fitting_tokens, f"whole pages of {page} tokens that fit, beside one of padding"),
        "max_total_num_tokens": (division.tokens, sizing.capped_by or "all that fit"),
        "pools": (
            pools, "tokens of each pool (states, where they are recurrent); bytes with padding and spare states",
        ),
        "spare_states": (division.spare_states, "in each recurrent pool: one for each token that a step may guess"),
        "kv_cache_bytes": (division.nbytes, " + ".join(f"{p['bytes']} ({name})" for name, p in pools.items())),
        "kv_cache_bytes_all_devices": (division.nbytes * sizing.devices, f"x {sizing.devices} device(s)"),
        "page_size": (page, "setting"),
        "max_running_requests": (
            sizing.max_running_requests,
            "setting" if config.max_running_requests is not None
            else f"{division.tokens} tokens / {TOKENS_PER_REQUEST}, from 1 to {MOST_REQUESTS}",
        ),
        "context_length": (
            sizing.context_length, "setting" if config.context_length is not None else "the model's own limit",
        ),
    }  # fmt: skip
    return {name: value for name, (value, _) in figures.items()} | {
        "derivation": {name: how for name, (_, how) in figures.items()}
    }


def _cells(sizing: Sizing) -> str:
    parts = [
        f"{c.page_bytes} (a page in {len(c.kind.layers)} {c.kind.name} layers) / {sizing.config.page_size} tokens"
        for c in sizing.costs
        if not c.recurrent
    ]
    return " + ".join(parts)
