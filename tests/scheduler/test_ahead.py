"""Steps that are planned ahead: what differs, and what must not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import EOS, World, expected_answer

from rootcellar.cache import sliding_window


def prompt(seed, length):
    return [(seed * 31 + i * (7 + seed)) % 50 for i in range(length)]


ASKED = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 24), st.integers(0, 14)), min_size=1, max_size=5)
WINDOW = st.sampled_from([None, sliding_window("window", (1,), 6)])


def served(asked, overlap, **options):
    """A world in which all that is asked for came to its end, a part of it after some steps."""
    world = World(tokens=400, running=5, overlap=overlap, window_tokens=400, **options)
    for i, (seed, length, most) in enumerate(asked):
        world.add(prompt(seed, length), most)
        # Whoever comes later comes when nothing is under way, as commands do.
        for _ in range(2 * (i % 2)):
            world.step()
        while world.under_way is not None:
            (plan, tokens), world.under_way = world.under_way, None
            world.finished += [r for r in world.scheduler.advance(plan, tokens) if r.finish is not None]
    world.run()
    return world


@settings(max_examples=60, deadline=None)
@given(ASKED, st.sampled_from([1, 4, 16]), st.sampled_from([4, 24]), WINDOW, st.sampled_from([0, 40]))
def test_with_room_for_all_nothing_differs(asked, page_size, chunk, window, states):
    """Answers, what of them was cached, and what the cache has in the end."""
    options = {"page_size": page_size, "chunk": chunk, "window": window, "states": states}
    one, other = (served(asked, overlap, **options) for overlap in (False, True))
    for a, b in zip(one.requests, other.requests, strict=True):
        assert (
            a.output.tolist()
            == b.output.tolist()
            == expected_answer(a.ids[: a.prompt_length], len(a.ids) - a.prompt_length)
        )
        assert (a.finish, a.cached) == (b.finish, b.cached)
        hits = [w.cache.match(r.key(r.length)).length for w, r in ((one, a), (other, b))]
        assert hits[0] == hits[1], "of the whole conversation"
    one.verify()
    other.verify()


def running(world, lengths, most=20, **options):
    """So many requests that decode, none of which comes to its end before ``most`` tokens."""
    quiet = [s for s in range(200) if EOS not in expected_answer(prompt(s, lengths[0]), most)]
    requests = [world.add(prompt(seed, n), most, **options) for seed, n in zip(quiet, lengths, strict=False)]
    for _ in range(3):
        world.step()
    return requests


def test_decode_steps_are_planned_ahead_from_the_first_token_on():
    world = World(tokens=400, chunk=64, overlap=True)
    (request,) = running(world, [9])
    world.run()
    assert request.generated == 20
    assert world.overlapped == 19, "all but the prompt's"


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("its next token follows from the one before", {"bound": True}),
        ("nobody knows how many tokens come", {"per_step": 2}),
    ],
)
def test_no_step_is_planned_ahead_where(what, options):
    world = World(tokens=400, chunk=64, overlap=True, per_step=options.pop("per_step", 1))
    running(world, [9], **options)
    world.run()
    world.verify()
    assert world.overlapped == 0, what


def test_steps_are_planned_ahead_where_no_guess_is_possible():
    """With three requests none is; with two, and with one, nobody knows how many tokens come."""
    world = World(tokens=400, chunk=64, overlap=True, per_step=2, unguessed=3)
    running(world, [9, 10, 11], 20)
    assert len(world.scheduler.running) == 3
    assert world.overlapped > 0
    assert world.scheduler.guesses.right + world.scheduler.guesses.wrong == 0
    world.run()
    world.verify()
    overlapped = world.overlapped
    running(world, [9], 20)
    world.run()
    assert world.overlapped == overlapped
    assert world.scheduler.guesses.right > 0


def test_a_prompt_has_its_turn():
    """One decodes, one is prefilled in chunks: their steps alternate as ever, and are not planned ahead."""
    kinds = []
    for overlap in (False, True):
        world = World(tokens=400, chunk=8, overlap=overlap)
        running(world, [9], 30)
        while world.under_way is not None:
            (plan, tokens), world.under_way = world.under_way, None
            world.scheduler.advance(plan, tokens)
        world.add(prompt(3, 60), 1)
        kinds.append([world.step().decode for _ in range(12)])
        world.run()
        world.verify()
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_who_waits_starts_when_a_request_comes_to_its_full_length(overlap):
    world = World(tokens=400, chunk=64, running=1, overlap=overlap)
    running(world, [9], 6)
    late = world.add(prompt(5, 9), 1)
    steps = 0
    while late.finish is None:
        world.step()
        steps += 1
    assert steps == 4, "three tokens of the one, and the other's"


def test_an_unexpected_end_costs_a_step_that_nobody_wants_and_nothing_else():
    seed = next(s for s in range(200) if 3 < len(expected_answer(prompt(s, 9), 20)) < 12)
    world = World(tokens=400, chunk=64, overlap=True)
    request = world.add(prompt(seed, 9), 20)
    while request.finish is None:
        world.step()
    plan, _ = world.under_way
    assert plan.requests == [request]
    assert world.scheduler.idle
    assert world.step() is plan
    assert world.step() is None
    world.verify()


def test_nobody_makes_way_for_a_step_that_is_planned_ahead():
    """Two requests in memory for one and a half: the younger is retracted when what it had was taken."""
    world = World(tokens=48, page_size=4, chunk=16, overlap=True)
    requests = running(world, [10, 10], 30)
    world.run()
    assert world.scheduler.retractions > 0
    assert world.overlapped > 0
    assert all(r.generated == 30 for r in requests)
    world.verify()


def test_a_state_is_left_where_a_conversation_goes_on():
    """An answer that ends on a page leaves its state there, although the next step would have been planned."""
    page = 4
    seed, n = next(
        (s, n) for s in range(300) for n in (9,) if (n - 1 + len(expected_answer(prompt(s, n), 40))) % page == 0
        and 8 < len(expected_answer(prompt(s, n), 40)) < 40
    )  # fmt: skip
    world = World(tokens=400, page_size=page, chunk=64, states=8, interval=1000, overlap=True)
    request = world.add(prompt(seed, n), 40)
    world.run()
    assert world.overlapped > 0
    again = world.add(np.concatenate([request.ids[: request.length], [1]]), 1)
    world.run()
    assert again.cached == request.length - 1
    world.verify()


@pytest.mark.parametrize("tenants", ["a", "ab"])
def test_a_queue_of_those_who_cannot_start_is_no_reason_to_wait(tenants):
    """All rows are taken, one by each call, and other calls wait: nobody makes way for them."""
    world = World(tokens=400, chunk=64, running=4, overlap=True)
    quiet = [s for s in range(200) if EOS not in expected_answer(prompt(s, 9), 20)]
    for i, seed in enumerate(quiet[:8]):
        world.add(prompt(seed, 9), 20, tenant=tenants[i % len(tenants)], call=i)
    for _ in range(8):
        world.step()
    assert world.overlapped > 5
    assert len(world.scheduler.waiting) == 4
    world.run()
    world.verify()
