"""How much of a mixed load fits at once: the real cache without the bytes, with split pools or with an arena.

A load is a list of waves; the requests of a wave (lengths in tokens) come in order and run together until one does not
fit. What counts is how many tokens ran at once, summed over the waves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rootcellar.cache import Key, Kind, RadixCache, Tier
from rootcellar.plan.arena import group
from rootcellar.plan.sizing import ARENA, Cost, Division, Rules, divide

Wave = Sequence[int]
_MOST = 1024  # requests in a wave


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Memory for the cache: ``nbytes``, for ``kinds`` whose layers all take ``layer_bytes`` for a page."""

    kinds: tuple[Kind, ...]
    layer_bytes: int
    nbytes: int
    rules: Rules


def mixed_load(seed: int, waves: int, short: tuple[int, int], long: tuple[int, int]) -> list[list[int]]:
    """Waves of requests, more than fit, of which some are long: their part of the tokens differs from wave to wave.

    ``short`` and ``long``: least and greatest length in tokens; lengths, and the part of a wave, are drawn evenly.
    """
    rng = np.random.default_rng(seed)
    load = []
    for part in rng.random(waves):
        weight = part / sum(long), (1 - part) / sum(short)
        bounds = [long if x < weight[0] / sum(weight) else short for x in rng.random(_MOST)]
        load.append([int(rng.integers(low, high + 1)) for low, high in bounds])
    return load


def split_cache(budget: MemoryBudget) -> tuple[RadixCache, Division] | None:
    """A cache with a pool for each kind, divided by the rules' ratio; None when not even the smallest pools fit."""
    costs = [Cost(kind, len(kind.layers) * budget.layer_bytes) for kind in budget.kinds]
    division = divide(costs, budget.rules, budget.nbytes)
    if division is None:
        return None
    page = budget.rules.page_size
    sizes = {(kind.name, Tier.DEVICE): division.pages[kind.name] * page for kind in budget.kinds}
    return _cache(budget.kinds, page, sizes, {}), division


def arena_cache(budget: MemoryBudget) -> tuple[RadixCache, Division] | None:
    """A cache whose kinds share an arena; None when they cannot, or when it would not fit."""
    grouping = group(budget.kinds, dict.fromkeys((kind.name for kind in budget.kinds), budget.layer_bytes))
    if grouping is None:
        return None
    costs = [Cost(kind, grouping.layers * budget.layer_bytes) for kind in grouping.kinds]
    division = divide(costs, replace(budget.rules, arena=grouping.members), budget.nbytes)
    if division is None:
        return None
    page = budget.rules.page_size
    sizes = {(ARENA, Tier.DEVICE): division.pages[ARENA] * page}
    return _cache(grouping.kinds, page, sizes, {ARENA: grouping.members}), division


def _cache(
    kinds: Sequence[Kind], page: int, sizes: dict[tuple[str, Tier], int], arenas: dict[str, tuple[str, ...]]
) -> RadixCache:
    longest_row = 2 * sum(sizes.values())
    return RadixCache(kinds, page_size=page, capacity=sizes, arenas=arenas, max_leases=_MOST, max_length=longest_row)


def longest(cache: RadixCache, step: int) -> int:
    """Tokens to which one request can grow, ``step`` computed at a time, with nothing else in the cache."""
    key = Key(np.arange(1 << 22))
    lease = cache.open(cache.match(key[:0]))
    assert lease is not None
    while cache.grow(lease, step):
        cache.commit(lease, key[: lease.length])
    while cache.grow(lease, cache.page_size):  # less than a whole step more
        pass
    cache.close(lease, keep=False)
    return lease.length


def fitting_tokens(cache: RadixCache, load: Iterable[Wave], chunk: int) -> int:
    """Tokens that run at once, summed over the waves of a load. Each request's tokens are its own."""
    fresh = itertools.count()
    return sum(_wave(cache, wave, chunk, fresh) for wave in load)


def _wave(cache: RadixCache, wave: Wave, chunk: int, fresh: Iterator[int]) -> int:
    leases = []
    total = 0
    for length in wave:
        key = Key(np.arange(length) + (next(fresh) << 32))
        lease = cache.open(cache.match(key[:0]))
        if lease is None:
            break
        leases.append(lease)
        while lease.length < length and cache.grow(lease, min(chunk, length - lease.length)):
            cache.commit(lease, key[: lease.length])
        if lease.length < length:
            break
        total += length
    for lease in leases:
        cache.close(lease, keep=False)
    return total


def best_split(budget: MemoryBudget, load: Sequence[Wave], chunk: int, ratios: Iterable[float]) -> tuple[float, int]:
    """The ratio of window to full tokens with which most of the load fits, and how many tokens that is."""
    best = (1.0, 0)
    for ratio in ratios:
        made = split_cache(replace(budget, rules=replace(budget.rules, swa_full_tokens_ratio=ratio)))
        if made is not None:
            best = max(best, (ratio, fitting_tokens(made[0], load, chunk)), key=lambda found: found[1])
    return best
