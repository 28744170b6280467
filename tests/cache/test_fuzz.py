"""The core against brute force: hypothesis finds and shrinks, the seeded driver covers ground."""

from __future__ import annotations

import fuzz
import pytest
from helpers import CORES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world import World


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_worlds_shrunk_by_hypothesis(data):
    world = World(lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0)
    for _ in range(data.draw(st.integers(1, 40))):
        world.step()


@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_steps_by_seed(seed):
    fuzz.run(steps=5_000, seed=seed)


@pytest.mark.skipif("native" not in CORES, reason="the native core was not built")
@pytest.mark.parametrize("seed", range(2))
def test_both_cores_do_the_same(seed):
    fuzz.lockstep(seed, first=0, worlds=20)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_long_night():
    fuzz.run(steps=1_000_000, seed=20_26)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.skipif("native" not in CORES, reason="the native core was not built")
def test_a_long_night_in_lockstep():
    fuzz.lockstep_everywhere(steps=1_000_000, seed=20_27)
