"""Costs that must not grow: eviction with the number of leaves, allocation with the pool."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from helpers import RadixCache

from rootcellar.cache import Done, Found, Key, SlotAllocator, Tier, full
from rootcellar.cache.radix import PyRadixCache

pytestmark = pytest.mark.usefixtures("core")


def fastest(action, repeat: int = 400) -> float:
    """Median seconds of an action."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def with_leaves(count: int) -> PyRadixCache:
    sizes = {("full", Tier.DEVICE): count, ("full", Tier.PEER): count}
    cache = RadixCache([full("full")], page_size=1, capacity=sizes, max_leases=1, max_length=4)
    for i in range(count):
        cache.learn(Found(Key([i]), Tier.PEER))
    return cache


def test_evicting_one_leaf_costs_the_same_among_many():
    cost = {}
    for leaves in (1_000, 30_000):
        cache = with_leaves(leaves)
        free = itertools.count(cache.stats().shelves["full", Tier.PEER].free + 1)

        def evict_one(cache=cache, free=free):
            assert cache.make_room("full", next(free), Tier.PEER)

        cost[leaves] = fastest(evict_one)
        cache.check()
    assert cost[30_000] < 5 * cost[1_000], cost  # the logarithm, and memory that is farther away; not 30 times


def test_taking_and_giving_a_slot_costs_the_same_in_any_pool():
    cost = {}
    for size in (10_000, 10_000_000):
        slots = SlotAllocator(size, 1)
        slots.give(slots.take(1))
        cost[size] = fastest(lambda slots=slots: slots.give(slots.take(1)), repeat=2000)
    assert cost[10_000_000] < 2.5 * cost[10_000], cost


def test_a_decode_step_is_one_allocation():
    cache = RadixCache([full("full")], page_size=1, capacity={("full", Tier.DEVICE): 4096}, max_length=64)
    leases = [cache.open(cache.match(Key([i]))) for i in range(256)]
    assert all(cache.grow_many(leases))
    assert len(set(cache.tables["full"][1:257, 0].tolist())) == 256
    assert not cache.moves()
    cache.learn(Done(1))


def test_what_is_left_of_a_long_prompt_does_not_keep_all_of_it_in_memory():
    cache = RadixCache([full("full")], page_size=1, capacity={("full", Tier.DEVICE): 4000}, max_length=4000)
    empty = cache.memory_bytes()
    for first in (0, 5000):
        lease = cache.open(cache.match(Key(range(first, first + 3900))))
        assert cache.grow(lease, 3900)
        cache.commit(lease, Key(range(first, first + 3900)))
        cache.close(lease)
    cached = cache.stats().shelves["full", Tier.DEVICE].cached
    assert cached > 3900
    assert cache.memory_bytes() - empty < 1.3 * cached * (8 + 4), "a token id and a page number for each token"
