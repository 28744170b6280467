"""Stages follow their table; what waits for bytes is not planned, and what lost them is computed again."""

import itertools

import pytest
from simulated import World, expected_answer

from rootcellar.cache import Tier
from rootcellar.errors import EngineError
from rootcellar.scheduler import Finish, Stage
from rootcellar.scheduler.stages import NEXT


def prompt(seed, length):
    return [(seed * 31 + i * (7 + seed)) % 50 for i in range(length)]


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_names_every_stage_and_every_stage_can_be_reached_and_ends():
    assert set(NEXT) == set(Stage)
    reached, more = {Stage.TOKENIZE}, [Stage.TOKENIZE]
    while more:
        new = NEXT[more.pop()] - reached
        reached |= new
        more += new
    assert reached == set(Stage)
    assert all(Stage.FINISHED in then for stage, then in NEXT.items() if stage is not Stage.FINISHED)
    assert not NEXT[Stage.FINISHED]


def test_a_request_goes_only_where_the_table_allows():
    for now, then in itertools.product(Stage, Stage):
        request = World().add(prompt(1, 5), 1)
        request.stage = now
        if then is now or then in NEXT[now]:
            request.enter(then)
            assert request.stage is then
        else:
            with pytest.raises(EngineError, match=f"is in stage {now} and cannot go to {then}"):
                request.enter(then)
            assert request.stage is now


# -- waiting for bytes ------------------------------------------------------------------------------------------------


@pytest.fixture
def world():
    """What ``prompt(1, ...)`` left is on HOST alone."""
    world = World(tokens=64, host=256, page_size=4, chunk=64)
    world.add(prompt(1, 20), 1)
    world.run()
    world.land()
    assert world.cache.make_room("full", 64)
    assert world.cache.match(world.requests[0].key(20)).length == 0
    return world


def test_a_request_is_planned_when_its_bytes_are_there(world):
    request = world.add(prompt(1, 24), 3)
    assert world.step() is None
    assert request.stage is Stage.LOADING
    assert request.cached is None
    other = world.add(prompt(2, 6), 2)
    assert world.step().requests == [other]
    world.copies.finish(dst=Tier.DEVICE)
    plans = [world.step() for _ in range(2)]
    assert next(c for plan in plans for c in plan.chunks if c.request is request).start == 20
    assert request.cached_by_tier == {"device": 0, "host": 20, "storage": 0}
    world.run()
    world.verify()


def test_a_request_that_lost_its_bytes_matches_again_and_computes_them(world):
    request = world.add(prompt(1, 24), 3)
    assert world.step() is None
    world.copies.finish(ok=False, dst=Tier.DEVICE)
    assert world.step().chunks[0].start == 0
    assert request.cached == 0
    assert request.retractions == 0
    world.run()
    assert request.output.tolist() == expected_answer(prompt(1, 24), 3)
    world.verify()


def test_a_request_that_waits_for_bytes_can_be_ended_and_its_copy_lands(world):
    request = world.add(prompt(1, 24), 3)
    world.step()
    world.scheduler.finish(request, Finish.abort("asked", "by a test"))
    assert world.scheduler.idle
    assert world.scheduler.awaits_bytes, "its pages are taken until the copy is there"
    world.copies.finish(dst=Tier.DEVICE)
    world.scheduler.learn(world.copies.reports().events)
    assert not world.scheduler.awaits_bytes
    assert world.cache.match(request.key(20)).length == 20
    world.verify()


def test_several_requests_wait_for_one_copy(world):
    requests = [world.add([*prompt(1, 24), i], 2) for i in range(3)]
    assert world.step() is None
    assert [r.stage for r in requests].count(Stage.LOADING) >= 1
    assert len(world.copies.pending) == 1
    world.run()
    world.verify()
    assert all(r.cached >= 20 for r in requests)


def test_who_finds_no_room_because_of_copies_waits_for_them(world):
    """All pages belong to copies whose request is gone: the next is neither refused nor computed, and then is."""
    asked = world.add([*prompt(1, 20), 3], 2)
    world.step()
    world.scheduler.finish(asked, Finish.abort("asked", "by a test"))
    request = world.add(prompt(3, 60), 4)
    while world.step() is not None:
        assert request.finish is None
    assert world.scheduler.awaits_bytes
    world.run()
    world.verify()
    assert len(request.output)


# -- several tokens a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [0, 16])
@pytest.mark.parametrize("per_step", [2, 3, 4])
def test_several_tokens_a_step_are_the_same_tokens_in_fewer_steps(per_step, states):
    steps = {}
    for n in (1, per_step):
        world = World(tokens=256, page_size=4, chunk=32, per_step=n, states=states, interval=64)
        for seed in range(6):
            world.add(prompt(seed, 10 + seed), 20 + seed)
        steps[n] = 0
        while (plan := world.step()) is not None:
            world.cache.check()
            steps[n] += plan.decode
        world.verify()
    assert steps[per_step] < 0.8 * steps[1]
