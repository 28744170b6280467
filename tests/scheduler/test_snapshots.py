"""Where requests leave recurrent states, what later requests get from them, and what they never get."""

import importlib.util
import sys
from pathlib import Path

import pytest
from simulated import World

from rootcellar.cache import Tier
from rootcellar.scheduler import Snapshots

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "recurrent_reuse.py"


def prompt(seed, length):
    return [(seed * 31 + i * (7 + seed)) % 50 for i in range(length)]


def states(world, request):
    """Boundaries of ``request`` (tokens) at which a state is in the cache."""
    boundaries = set()
    for n in range(world.page_size, request.length + 1, world.page_size):
        if world.cache.match(request.key(n)).length == n:
            boundaries.add(n)
    return boundaries


def serve(world, tokens, most=1):
    request = world.add(tokens, most)
    world.run()
    return request


def test_a_prompt_leaves_states_at_intervals_and_at_its_tail():
    world = World(tokens=512, page_size=4, chunk=64, states=16, interval=16)
    request = serve(world, prompt(1, 59))
    assert states(world, request) == {16, 32, 48, 56}
    world.verify()


def test_chunks_that_end_on_a_page_leave_states():
    world = World(tokens=512, page_size=4, chunk=10, states=16, interval=1000)
    request = serve(world, prompt(1, 27))
    assert states(world, request) == {8, 16, 24}


def test_the_second_request_leaves_a_state_where_it_parts_and_the_third_resumes_there():
    world = World(tokens=512, page_size=4, chunk=64, states=16, interval=1000)
    shared = prompt(1, 30)
    first, second, third = (serve(world, shared + prompt(seed, 12)) for seed in (20, 21, 22))
    assert [r.cached for r in (first, second, third)] == [0, 0, 28]
    assert 28 in states(world, third)
    world.verify()


def test_the_same_prompt_again_resumes_at_its_last_page():
    for page_size, cached in ((1, 40), (4, 40), (16, 32)):
        world = World(tokens=512, page_size=page_size, chunk=64, states=16, interval=1000)
        assert [serve(world, prompt(3, 41)).cached for _ in range(2)] == [0, cached]
        world.verify()


@pytest.mark.parametrize("per_step", [1, 4])
@pytest.mark.parametrize("page_size", [1, 4])
def test_decoding_leaves_a_state_every_interval_and_a_conversation_goes_on_from_it(page_size, per_step):
    """However many tokens a step gives: none goes beyond the interval's end."""
    world = World(tokens=512, page_size=page_size, chunk=64, states=16, interval=20, least=4, per_step=per_step)
    seed = next(s for s in range(99) if serve(World(tokens=512), prompt(s, 7), 60).generated == 60)
    first = serve(world, prompt(seed, 7), 60)
    assert {20, 40, 60} <= states(world, first)
    assert not states(world, first) & set(range(41, 60))
    again = serve(world, [*first.ids[:50].tolist(), 3, 3, 3])
    assert again.cached == 40
    world.verify()


def test_an_interval_is_rounded_up_to_whole_pages():
    assert Snapshots(16, 20).period == 32
    assert Snapshots(1, 20).period == 20
    assert Snapshots(64, 1).period == 64


def test_states_are_not_left_closer_together_than_is_worth_it():
    world = World(tokens=512, page_size=1, chunk=64, states=16, interval=8, least=12)
    request = serve(world, prompt(1, 40))
    left = sorted(states(world, request))
    assert left == [16, 32]
    assert all(b - a >= 12 for a, b in zip([0, *left], left, strict=False))


def test_requests_that_arrive_together_resume_where_they_part():
    """The first leaves a state where those that wait for it go another way: nobody computes the prefix again."""
    world = World(tokens=1024, page_size=4, chunk=32, states=24, interval=1000, running=4)
    shared = prompt(1, 82)
    requests = [world.add(shared + prompt(seed, 40), 1) for seed in (20, 21, 22, 23)]
    world.run()
    assert [r.cached for r in requests] == [0, 80, 80, 80]
    world.verify()


def test_a_retracted_request_goes_on_from_its_last_state():
    world = World(tokens=48, page_size=4, chunk=16, running=3, states=6, interval=8, least=4)
    for seed in (1, 2, 5):
        world.add(prompt(seed, 12), 30)
    world.run()
    world.verify()
    assert world.scheduler.retractions > 0


def test_few_states_are_enough_to_run():
    """Two states: one request at a time, one to read and one to write; nothing hangs."""
    world = World(tokens=256, page_size=4, chunk=16, running=4, states=2, interval=8)
    for seed in (1, 1, 2, 3):
        world.add(prompt(seed, 30), 6)
    world.run()
    world.verify()


def test_states_inside_a_chain_leave_before_those_at_ends_and_branches():
    world = World(tokens=2048, page_size=4, chunk=64, states=10, interval=16)
    shared = prompt(1, 64)
    for seed in (20, 21):
        serve(world, shared + prompt(seed, 12))
    for seed in (31, 32):
        serve(world, prompt(seed, 70))
    assert serve(world, shared + prompt(23, 12)).cached == 64, "the branch survived the others' intervals"
    assert world.cache.stats().shelves["state", Tier.DEVICE].evicted > 0
    world.verify()


# --- the workload of benchmarks/recurrent_reuse.py --------------------------------------------------------------------


@pytest.fixture(scope="module")
def reuse():
    spec = importlib.util.spec_from_file_location("recurrent_reuse", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page_size", [1, 16])
def test_shared_prompts_and_branching_conversations_hit_nearly_as_with_full_attention(reuse, page_size):
    """At least 80 % of the tokens that full attention finds, with 64 states; ends only finds far fewer."""
    turns = list(reuse.Workload(requests=200).turns())
    most, total = reuse.run(turns, page_size, 0, None)
    ours, _ = reuse.run(turns, page_size, 64, Snapshots(page_size, 256), check=True)
    ends, _ = reuse.run(turns, page_size, 64, reuse.EndsOnly(page_size, 256))
    assert most > 0.8 * total  # the workload shares a lot
    assert ours >= 0.8 * most
    assert ends <= 0.6 * most


def test_states_in_unique_tails_alone_are_never_hit(reuse):
    """One-off questions under shared prompts: what ends only leaves stands for tokens that nobody sends again."""
    turns = [
        reuse.Turn([app * 1000 + i for i in range(600)], [50_000 + 100 * n + i for i in range(60)], [7] * 20)
        for n, app in enumerate([0, 1, 2] * 12)
    ]
    most, _ = reuse.run(turns, 16, 0, None)
    assert reuse.run(turns, 16, 64, reuse.EndsOnly(16, 256))[0] == 0
    assert reuse.run(turns, 16, 64, Snapshots(16, 256))[0] >= 0.8 * most
