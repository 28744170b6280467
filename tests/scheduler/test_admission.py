"""A request that has to wait counts once, however often it is looked at: when it is started."""

import numpy as np
import pytest
from simulated import World

from rootcellar.cache import Key, chunked_local, sliding_window
from rootcellar.cache.radix import PyRadixCache

CORES = {"python": PyRadixCache}
try:
    from rootcellar.cache.native import NativeRadixCache
except ImportError:  # without a C++ compiler
    pass
else:
    CORES["native"] = NativeRadixCache

WORLDS = {
    "full": {},
    "window": {"window": sliding_window("window", (1,), 9), "window_tokens": 120},
    "chunk": {"window": chunked_local("chunk", (1,), 12), "window_tokens": 120},
    "states": {"states": 8, "interval": 8},
}


def prompt(seed, length):
    return [(seed * 31 + i * (7 + seed)) % 50 for i in range(length)]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kinds", WORLDS)
@pytest.mark.parametrize("eviction", ["lru", "lfu", "slru", "priority", "adaptive", "mru"])
def test_a_thousand_blocked_steps_change_nothing(core, kinds, eviction):
    world = World(tokens=80, chunk=64, running=4, core=CORES[core], eviction=eviction, **WORLDS[kinds])
    world.add(prompt(3, 30), 1)
    world.run()  # what the blocked request will share, inside an edge
    world.add(prompt(1, 36), 30)
    world.step()
    blocked = world.add(prompt(3, 18) + prompt(4, 40), 2)
    assert world.cache.pin(Key(prompt(3, 8), "/"), 3)
    world.scheduler.plan()
    before, stats, tick = world.cache._frozen(), world.cache.stats(), world.cache.tick
    for _ in range(1000):
        assert world.scheduler.plan() is not None
        assert blocked.lease is None
    assert world.cache.stats() == stats
    assert world.cache.tick == tick
    assert world.cache._frozen() == before, "the tree or the order of leaving changed"
    world.cache.check()
    world.run()
    assert world.cache.stats().requests == 3 + world.scheduler.retractions
    assert world.cache.tick == 3 + world.scheduler.retractions
    world.cache.unpin(Key(prompt(3, 30), "/"))
    world.verify()


@pytest.mark.parametrize("core", CORES)
def test_a_request_starts_as_soon_as_there_is_room_for_it_beside_what_it_shares(core):
    """Room that its own prefix takes is none: 20 of 64 tokens are cached and may leave, until it resumes from them."""
    world = World(tokens=64, chunk=64, running=4, core=CORES[core])
    world.add(prompt(3, 21), 1)
    world.run()
    world.add(prompt(1, 12), 8)
    world.step()
    second = world.add(prompt(3, 20) + prompt(4, 12), 1)
    world.step()
    assert second.cached == 20
    world.run()
    assert world.scheduler.retractions == 0
    world.verify()
    assert np.array_equal(second.ids[:20], prompt(3, 20))


@pytest.mark.parametrize("window", [None, sliding_window("window", (1,), 9)])
@pytest.mark.parametrize(("reserved", "beside"), [(0, True), (8, True), (20, False), (10**6, False)])
def test_room_is_kept_for_answers_that_run(window, reserved, beside):
    """Two prompts of 10 tokens and answers of 40 in a cache of 52."""
    world = World(tokens=52, page_size=1, chunk=64, running=4, reserved=reserved, window=window, window_tokens=200)
    first = world.add(prompt(1, 10), 40)
    world.step()
    second = world.add(prompt(2, 10), 40)
    world.step()
    assert first.lease is not None, "whoever is alone starts, however long its answer may be"
    assert (second.lease is not None) == beside
    world.run()
    world.verify()
    assert (world.scheduler.retractions == 0) == (not beside), "those that run are not retracted for it"
    assert second.generated == 40 or second.finish.type == "stop"
