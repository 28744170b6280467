"""Both cores remember so much and no more, and forget the same: worlds that go past what the memories hold."""

from __future__ import annotations

import random

import numpy as np
import pytest
from helpers import CORES

from rootcellar.cache import Key, Tier, full, sliding_window
from rootcellar.cache.adaptive import MAX_SHADOW
from rootcellar.cache.journal import REMEMBERED

pytestmark = pytest.mark.skipif("native" not in CORES, reason="the native core was not built")


def twins(kinds, page_size, capacity, **options):
    from twins import Twins  # the native core may not be built

    sizes = {(kind.name, Tier.DEVICE): capacity for kind in kinds}
    return Twins(kinds, page_size=page_size, capacity=sizes, max_leases=4, **options)


def serve(cache, ids):
    key = Key(ids)
    lease = cache.open(cache.match(key))
    assert cache.grow(lease, len(key) - lease.length)
    cache.commit(lease, key)
    cache.close(lease)


def test_evictions_beyond_what_is_remembered():
    """Some are of places that were noted before, so that what is oldest is not simply what came first."""
    cache = twins((full("full"), sliding_window("window", window=2)), 1, 24, max_length=8)
    memory = cache._inside().tree.evictions
    rng = random.Random(0)
    served = full_at = 0
    while not full_at or served < full_at + 1000:
        first = rng.randrange(40) if rng.random() < 0.3 else 1000 + 10 * served + rng.randrange(10_000)
        serve(cache, [first, *(rng.randrange(4) for _ in range(rng.randrange(8)))])
        served += 1
        if served % 400 == 0:
            cache.compare()
        if not full_at and served % 50 == 0 and len(memory.notes()) == REMEMBERED:
            full_at = served
    assert len(memory.notes()) == REMEMBERED
    assert len(cache.take_evictions()) == REMEMBERED, "the newest"
    cache.compare()
    assert cache.take_evictions() == []
    for first in range(40):
        cache.explain(Key([first, 0, 0, 0]))
    cache._both("check")


def test_samples_beyond_what_a_shadow_remembers():
    """Prompts of 32 samples each, of which some return, until the shadow samples half as many."""
    page, length = 512, 32 * 512
    cache = twins((full("full"),), page, 1 << 21, max_length=length, policy="adaptive")
    shadow = cache._inside().tree.shadow
    assert (shadow.stride, shadow.window) == (page, 1 << 26)
    rng = np.random.default_rng(0)
    sample, thinned, most = shadow.sample, 0, 0
    for number in range(1300):
        seed = int(rng.integers(number)) if number and number % 8 == 0 else number
        serve(cache, np.arange(seed << 20, (seed << 20) + length))
        most = max(most, len(shadow.seen))
        if shadow.sample != sample or number % 300 == 0:
            thinned += shadow.sample != sample
            sample = shadow.sample
            cache.compare()
    cache.compare()
    assert thinned == 1
    assert MAX_SHADOW < most <= MAX_SHADOW + 32
    assert len(shadow.seen) <= MAX_SHADOW
    cache._both("check")
