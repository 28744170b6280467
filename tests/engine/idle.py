"""What is true of every engine at rest, and what some tests do to one before."""

from rootcellar.scheduler import Rates


def always_load(engine):
    """Let nothing be measured: then what a farther tier has is loaded, however small the model."""
    engine._loop.machine.recorder.meter.rates = lambda stats, now: Rates()
    return engine


def check_idle(engine):
    """When idle, what is not free is cached, and nobody holds it, for every kind; after a flush everything is free."""
    engine._loop.call(engine._loop.machine.life.settle)
    engine.check()
    for tiers in engine.stats()["cache"].values():
        shelf = tiers["DEVICE"]
        assert shelf["used"] == shelf["cached"]
        assert shelf["pinned"] == shelf["leased"] == 0
    engine.flush_cache()
    shelves = [shelf for tiers in engine.stats()["cache"].values() for shelf in tiers.values()]
    assert all(shelf["free"] == shelf["size"] for shelf in shelves)


def settle(engine):
    """Wait until no copy between tiers is under way."""
    engine._loop.call(engine._loop.machine.life.settle)


def evict(engine, *tiers):
    """Leave to the farther tiers alone what they have."""

    def make_room():
        for tier in tiers:
            for kind in engine._cache.kinds:
                size = engine._cache.stats().shelves[kind.name, tier].size
                assert engine._cache.make_room(kind.name, size, tier)

    engine._loop.call(make_room)
