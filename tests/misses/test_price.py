"""What tokens of a prompt took: steps are parted so that the parts sum up, and what tokens take is learnt."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootcellar.misses import PrefillCost, Spent, StepsTaken, learned, pairs

TRUE = PrefillCost(step=0.02, token=0.003, pair=2e-7)


def measured(rng, count, effort, noise=0.0):
    found = []
    for _ in range(count):
        ends = np.cumsum([rng.integers(0, 6000), *rng.integers(1, 512, rng.integers(1, 5))]).tolist()
        chunks = list(itertools.pairwise(ends))
        seconds = sum(effort.of(*chunk) for chunk in chunks) * float(rng.uniform(1 - noise, 1 + noise))
        found.append(StepsTaken(len(chunks), ends[-1] - ends[0], sum(pairs(*chunk) for chunk in chunks), seconds))
    return found


def test_pairs_are_those_of_a_token_and_an_earlier_one():
    for start, stop in ((0, 0), (0, 5), (7, 9)):
        assert pairs(start, stop) == sum(len(range(at)) for at in range(start, stop))


@pytest.mark.parametrize("seed", range(5))
def test_what_tokens_take_is_learnt_whatever_some_steps_took(seed):
    rng = np.random.default_rng(seed)
    steps = measured(rng, 48, TRUE, noise=0.03)
    for i in range(0, 48, 6):  # some compile
        steps[i] = steps[i]._replace(seconds=steps[i].seconds * 20)
    found = learned(steps)
    for start, stop in ((0, 512), (4000, 4512), (100, 132)):
        assert found.of(start, stop) == pytest.approx(TRUE.of(start, stop), rel=0.08)


@pytest.mark.parametrize("terms", [(0.0, 0.003, 0.0), (0.02, 0.0, 1e-6), (0.0, 0.0, 1e-6)])
def test_no_term_is_below_nothing(terms):
    rng = np.random.default_rng(0)
    found = learned(measured(rng, 20, PrefillCost(*terms), noise=0.2))
    assert min(found.step, found.token, found.pair) >= 0
    assert found


def test_of_nothing_nothing_is_learnt():
    assert not learned([])
    assert not learned([StepsTaken(1, 16, 120, 0.0)])
    assert PrefillCost().price(0, 16, ()) is None
    assert PrefillCost().price(16, 16, ()) == 0


def test_of_steps_that_are_all_alike_their_time_is_learnt():
    found = learned([StepsTaken(1, 64, pairs(0, 64), 0.5)] * 3)
    assert found.of(0, 64) == pytest.approx(0.5)


@given(st.lists(st.integers(1, 600), min_size=2, max_size=8), st.data())
def test_prices_of_parts_are_those_that_the_steps_would_have_saved(lengths, data):
    """A prompt in chunks that took what they take: its first tokens cost all but what the rest needs alone."""
    ends = [0, *itertools.accumulate(lengths)]
    spent = [Spent(a, b, 1.7 * TRUE.of(a, b)) for a, b in itertools.pairwise(ends)]  # the machine is slower just then
    total = sum(each.seconds for each in spent)
    at = data.draw(st.integers(1, ends[-1]))
    price = TRUE.price(0, at, spent)
    rest = sum(1.7 * TRUE.of(max(a, at), b) for a, b in itertools.pairwise(ends) if b > at)
    assert price == pytest.approx(total - rest)
    first = data.draw(st.integers(0, at - 1))
    assert 0 <= TRUE.price(first, at, spent) <= price + 1e-9


def test_what_was_not_measured_is_estimated():
    assert TRUE.price(0, 300, ()) == pytest.approx(TRUE.of(0, 300) - TRUE.step)
    half = TRUE.price(0, 300, [Spent(0, 200, 5.0)])
    assert half == pytest.approx(5.0 + TRUE.of(200, 300) - TRUE.step)
    sized = replace(TRUE, sizes=(64, 256))
    assert (sized.of(0, 65), sized.of(0, 64)) == (pytest.approx(TRUE.of(0, 256), rel=0.01), TRUE.of(0, 64))
    rest = sized.of(200, 210) - TRUE.step
    assert sized.price(0, 200, [Spent(0, 210, sized.of(0, 210))]) == pytest.approx(sized.of(0, 210) - rest - TRUE.step)
    assert PrefillCost().price(0, 300, [Spent(0, 200, 5.0)]) == 5.0
    assert PrefillCost().price(0, 50, [Spent(0, 200, 5.0)]) == pytest.approx(1.25)
