"""The adaptive policy: what it learns, and that what it learns pays."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers import make, serve, tokens

from rootcellar.cache.adaptive import BUCKETS, CLASSES, CONTINUES, FRESH, MAX_SHADOW, Shadow, _gittins, group_of
from rootcellar.sim.replay import optimal, replay
from rootcellar.sim.workloads import WORKLOADS, workload


def test_the_index_prefers_what_returns_soon_and_gives_up_on_what_no_longer_does():
    width = np.full(6, 10.0)
    index = _gittins(np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0]), width)
    assert index[0] < index[1] < index[2], "worth grows as the time of return comes nearer"
    assert not index[3:].any(), "and is nothing after it"
    # From bucket 2: half return in a bucket of 10, those that do wait 5 on average.
    assert index[2] == pytest.approx(0.5 / 7.5)
    steady = _gittins(np.full(6, 0.2), width)
    assert np.allclose(steady, steady[0]), "an even chance of return does not age"


def test_histories_fall_into_one_class_per_doubling():
    assert [group_of(h) for h in (FRESH, CONTINUES)] == [0, 1]
    assert [group_of(1 + returns) for returns in (1, 2, 3, 4, 7, 8)] == [2, 3, 3, 4, 4, 5]
    assert group_of(10**9) == CLASSES - 1


def test_a_shadow_remembers_returns_and_tells_branches_from_continuations():
    shadow = Shadow(capacity=1000, page_size=16)
    prefixes = shadow.hashes(1, np.arange(shadow.stride * 3))
    assert shadow.hashes(1, np.arange(shadow.stride * 3 + 5)) == prefixes, "a part of a stride has no prefix"
    assert shadow.hashes(2, np.arange(shadow.stride * 3)) != prefixes
    assert shadow.observe(prefixes[:2], -1, False) == ([FRESH, FRESH], -1)
    shadow.advance(100)
    classes, above = shadow.observe(prefixes, -1, False)
    assert classes == [2, 2, CONTINUES]
    for _ in range(4):
        classes, above = shadow.observe(prefixes[:2], -1, False)
    assert shadow.observe([12345], above, False)[0] == [FRESH], "what branches off a popular prefix is fresh"


def test_a_shadow_is_bounded_and_forgets():
    shadow = Shadow(capacity=10_000_000, page_size=16)
    rng = np.random.default_rng(0)
    for _ in range(60):
        shadow.observe([int(x) for x in rng.integers(0, 2**63, 1000) * 2], -1, False)
        shadow.advance(1_000_000)
    assert len(shadow.seen) <= MAX_SHADOW
    shadow.advance(shadow.window + 1)
    assert not shadow.seen
    assert shadow.worth.shape == (CLASSES, BUCKETS)


@pytest.mark.parametrize("resident", [True, False])
def test_where_lru_would_have_had_more_it_rests_and_tries_again_ever_more_seldom(resident):
    """Of each request 50 prefixes return at once, which LRU would have kept; whether they are there is what differs."""
    shadow = Shadow(capacity=10_000, page_size=16)
    rng = np.random.default_rng(0)
    returning = [int(x) for x in rng.integers(0, 2**63, 50)]
    turns = [(False, 0)]
    for _ in range(2_000):
        shadow.advance(1_000)
        shadow.observe([*returning, *(int(x) for x in rng.integers(0, 2**63, 30))], -1, resident)
        if shadow.resting != turns[-1][0]:
            turns.append((shadow.resting, shadow.volume))
            assert shadow.worth.any() != shadow.resting
    if resident:
        assert turns == [(False, 0)]
        return
    rests = [after - before for (resting, before), (_, after) in pairwise(turns) if resting]
    trials = [after - before for (resting, before), (_, after) in pairwise(turns) if not resting]
    assert max(trials) < 10 * shadow.capacity
    assert all(1.8 < after / before < 2.2 for before, after in pairwise(rests[:4]))
    assert len(rests) >= 4


@pytest.mark.parametrize(("gaps", "rests"), [((50, -48), False), ((1, 1), True), ((2, -1), True), ((-1, -1), False)])
def test_it_rests_for_what_lru_wins_by_more_than_chance(gaps, rests):
    """What LRU would have had more of each request, in turn: as much more or less by chance is no reason."""
    shadow = Shadow(capacity=10_000, page_size=16)
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(1_000):
        shadow.advance(1_000)
        seen.add(shadow.resting)
        shadow.observe([int(x) for x in rng.integers(0, 2**63, 80)], -1, False)
        shadow.gap = gaps[i % 2] if shadow.watching else 0
    assert seen == {False, rests}


def test_before_anything_is_known_it_is_lru():
    cache = make(size=32, policy="adaptive")
    serve(cache, tokens((0, 16)))
    serve(cache, tokens((100, 16)))
    serve(cache, tokens((0, 16)))
    serve(cache, tokens((200, 16)))
    assert cache.match(_key(100)).length == 0
    assert cache.match(_key(0)).length == 16


def _key(first):
    from rootcellar.cache import Key

    return Key(tokens((first, 16)))


@pytest.mark.parametrize("name", WORKLOADS)
def test_it_is_near_the_best_fixed_policy_whatever_that_is(name):
    """As docs/cache.md says: nowhere by more than 0.1 points."""
    requests = workload(name)
    for capacity in (50_000, 100_000, 400_000):
        rates = {
            policy: replay(requests, capacity=capacity, policy=policy).hit_rate
            for policy in ("lru", "lfu", "slru", "adaptive")
        }
        ours = rates.pop("adaptive")
        assert ours >= max(rates.values()) - 0.001, f"{capacity}: adaptive {ours:.4f}, fixed {rates}"
        assert ours <= optimal(requests, capacity=capacity).hit_rate
