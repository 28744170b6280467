"""What waiting requests would find cached is told to the cache: it leaves last, and nothing of it stays behind."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import World

from rootcellar.cache import RadixCache
from rootcellar.cache.check import walk
from rootcellar.scheduler.foresight import MOST


def prompt(seed, length):
    return [(seed * 31 + i * 7) % 41 + 8 for i in range(length)]


def turns(world):
    """By node that somebody waits for: whose turn it is."""
    return {node.id: max(node.turns) for node in walk(world.cache._inside().tree) if any(node.turns)}


def cached(world, ids):
    return world.cache.explain(world.scheduler.key(ids, "")).reaches[0]


def serve(world, ids):
    """A request from its beginning to its end, of one token."""
    world.add(ids, 1)
    world.run()


def busy(world):
    """A request that takes the only row, and grows."""
    request = world.add(prompt(90, 8), 40)
    world.step()
    assert request in world.scheduler.running
    return request


@pytest.mark.parametrize("eviction", ["lru", "slru", "adaptive"])
def test_a_queued_prompt_finds_its_prefix_although_what_runs_needed_the_room(eviction):
    """Without being told, each of these policies gives up the oldest."""
    hits = []
    for queued in (False, True):
        world = World(tokens=96, running=1, chunk=64, policy="fcfs", eviction=eviction)
        mine, others = prompt(1, 24), [prompt(2 + i, 24) for i in range(2)]
        for ids in (mine, *others):
            serve(world, ids)
        world.add(prompt(50, 46), 1)  # it needs the room of one of them
        if queued:
            mine_again = world.add([*mine, 9, 9], 1)
            world.run()
        else:
            world.run()
            mine_again = world.add([*mine, 9, 9], 1)
            world.run()
        hits.append(mine_again.cached)
        assert turns(world) == {}
        world.verify()
    assert hits == [0, 24]


def test_nothing_stays_awaited_when_who_waited_is_gone():
    world = World(tokens=160, running=1, chunk=64)
    one, two = prompt(1, 24), [*prompt(1, 16), *prompt(5, 12)]
    for ids in (one, two):
        serve(world, ids)
    busy(world)
    first, second = world.add([*one, 9], 1), world.add([*two, 9], 1)
    world.step()
    assert sorted(turns(world).values()) == [1, 1, 2], "what both share is wanted by the first"
    world.abort(first)
    world.step()
    assert sorted(turns(world).values()) == [1, 1], "what both share is wanted still"
    world.abort(second)
    assert turns(world) == {}, "at once, though nothing may be planned for long"
    world.run()
    world.verify()


def test_other_weights_leave_nobody_awaiting_what_nobody_will_hit():
    world = World(tokens=160, running=1, chunk=64)
    serve(world, prompt(1, 24))
    busy(world)
    world.add([*prompt(1, 24), 9], 1)
    world.step()
    assert turns(world)
    world.scheduler.set_epoch("new")
    assert turns(world) == {}
    world.run()
    assert turns(world) == {}


def test_the_turns_of_two_tenants_alternate_however_long_the_line_of_one_is():
    world = World(tokens=400, running=1, chunk=64, policy="fcfs")
    lots = [prompt(i, 12) for i in range(10, 18)]
    few = [prompt(i, 12) for i in range(30, 32)]
    for ids in (*lots, *few):
        serve(world, ids)
    busy(world)
    for ids in lots:
        world.add([*ids, 9], 1, tenant="lots")
    for ids in few:
        world.add([*ids, 9], 1, tenant="few")
    world.step()
    key = world.scheduler.key
    found = turns(world)
    assert [found[world.cache.trail(key(ids, ""))[-1]] for ids in few] in ([1, 3], [2, 4])
    world.run()
    world.verify()


@dataclass
class Listener:
    """A cache that counts what it is told."""

    cache: RadixCache
    said: list[int] = field(default_factory=list)

    def foresee(self, keys):
        self.said.append(len(keys))
        return self.cache.foresee(keys)


def test_a_long_line_is_said_again_only_when_enough_of_it_has_changed(monkeypatch):
    """A request costs the walks of at most eight prompts, however many wait; and no more are said than that."""
    world = World(tokens=400, running=2, chunk=64, policy="fcfs")
    listener = Listener(world.cache)
    monkeypatch.setattr(world.scheduler._foresight, "_cache", listener)
    count = MOST + 100
    for i in range(count):
        world.add(prompt(i, 4), 1)
    world.run()
    assert max(listener.said) == MOST
    # Each comes and ends.
    assert sum(listener.said) <= 4 * 2 * count
    world.verify()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_is_awaited_is_on_the_ways_of_those_who_wait_or_run(data):
    """Whatever comes and goes: short lines are said whole, each time somebody may start."""
    world = World(
        tokens=data.draw(st.sampled_from([64, 96])),
        page_size=data.draw(st.sampled_from([1, 4])),
        running=data.draw(st.integers(1, 3)),
        chunk=16,
        policy=data.draw(st.sampled_from(["lpm", "fcfs"])),
        host=data.draw(st.sampled_from([0, 64])),
        eviction=data.draw(st.sampled_from(["lru", "adaptive"])),
    )
    told = world.scheduler._foresight
    for _ in range(data.draw(st.integers(1, 30))):
        what = data.draw(st.sampled_from(["add", "add", "step", "step", "abort", "copy"]))
        alive = [r for r in world.requests if r.finish is None]
        if what == "add":
            ids = prompt(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 20)))
            ids += prompt(40 + data.draw(st.integers(0, 2)), 2)
            world.add(ids, data.draw(st.integers(1, 8)), tenant=data.draw(st.sampled_from(["", "x"])))
        elif what == "abort" and alive:
            world.abort(data.draw(st.sampled_from(alive)))
        elif what == "copy" and world.copies.pending:
            world.copies.finish()
        else:
            world.step()
        world.cache.check()
        waiting = [r for r in world.scheduler.waiting if r.finish is None]
        awaited = set(turns(world))
        if not waiting:
            assert not awaited
        elif told._changes == 0 and told._told:
            alive = [*waiting, *world.scheduler.running]  # who started holds what was awaited for it
            ways = [world.cache.trail(r.key(r.matchable)) for r in alive]
            assert awaited <= {node for way in ways for node in way}
    world.run()
    assert turns(world) == {}
    world.verify()
