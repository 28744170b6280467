"""Dividing a budget among kinds: never more than it, never a refusal of what fits, against a slow obvious search."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.cache.kind import chunked_local, full, recurrent, sliding_window
from rootcellar.plan.sizing import MIN_STATES, Cost, Rules, concurrency, divide, largest, request_pages, smallest

unhurried = settings(deadline=None, max_examples=300)

KINDS = (full("full"), sliding_window("window", window=40), chunked_local("chunk", chunk=24), recurrent("state"))


@st.composite
def cases(draw):
    chosen = draw(st.sets(st.sampled_from(KINDS), min_size=1).filter(lambda s: any(k.rule != "recurrent" for k in s)))
    costs = [Cost(kind, draw(st.integers(1, 50))) for kind in KINDS if kind in chosen]
    rules = Rules(
        page_size=draw(st.sampled_from([1, 4, 16])),
        swa_full_tokens_ratio=draw(st.sampled_from([0.01, 0.3, 0.8, 1.0])),
        mamba_full_memory_ratio=draw(st.sampled_from([0.1, 0.9, 3.0])),
        max_total_tokens=draw(st.none() | st.integers(16, 600)),
        inflight=draw(st.sampled_from([1, 8, 100])),
        max_mamba_cache_size=draw(st.none() | st.none() | st.integers(2, 20)),
        running=draw(st.integers(0, 5)),
    )
    return costs, rules, draw(st.integers(0, 8000))


def obvious_bytes(costs, rules, pages, states):
    """The bytes of pools with ``pages`` pages of the full kind and ``states`` states, written down kind by kind."""
    has_full = any(c.kind.rule == "full" for c in costs)
    total = 0
    for cost in costs:
        count = pages
        if cost.kind.rule == "recurrent":
            count = states
        elif cost.kind.rule != "full" and has_full:
            tokens = cost.kind.span + max(rules.inflight, rules.page_size) - (cost.kind.rule == "sliding_window")
            tokens = min(tokens, pages * rules.page_size)
            aligned = cost.kind.rule == "chunked_local" and cost.kind.span % rules.page_size == 0
            one_request = (tokens + rules.page_size - 1) // rules.page_size + (not aligned)
            count = min(pages, max(int(pages * rules.swa_full_tokens_ratio), one_request))
        total += (count + 1) * cost.page_bytes
    return total


def obvious_search(costs, rules, budget):
    """The most pages of the full kind, with as few states as may be, or None."""
    states = (rules.max_mamba_cache_size or MIN_STATES) if any(c.recurrent for c in costs) else 0
    if rules.max_total_tokens is not None:
        pages = rules.max_total_tokens // rules.page_size
        return pages if obvious_bytes(costs, rules, pages, states) <= budget else None
    pages = 0
    while obvious_bytes(costs, rules, pages + 1, states) <= budget:
        pages += 1
    return pages or None


@unhurried
@given(cases())
def test_never_beyond_the_budget_and_never_a_refusal_of_what_fits(case):
    costs, rules, budget = case
    division, slow = divide(costs, rules, budget), obvious_search(costs, rules, budget)
    assert (division is None) == (slow is None)
    assert (division is None) == (smallest(costs, rules) > budget)
    if division is None:
        return
    states = division.pages.get("state", 0)
    pages = division.tokens // rules.page_size
    assert division.nbytes == obvious_bytes(costs, rules, pages, states) <= budget
    if rules.max_total_tokens is not None or not states:
        assert pages == slow
    else:  # states take their share; with them, not one page more would fit
        assert obvious_bytes(costs, rules, pages + 1, states) > budget


@unhurried
@given(cases())
def test_states_get_their_share_but_no_more(case):
    costs, rules, budget = case
    division = divide(costs, rules, budget)
    if division is None or "state" not in division.pages:
        return
    state = next(c.page_bytes for c in costs if c.recurrent)
    if rules.max_mamba_cache_size is not None:
        assert division.pages["state"] == rules.max_mamba_cache_size
        return
    if rules.max_total_tokens is not None:
        tokens = obvious_bytes([c for c in costs if not c.recurrent], rules, division.tokens // rules.page_size, 0)
        most = max(tokens * rules.mamba_full_memory_ratio / state - 1, 4 * rules.running, MIN_STATES)
        assert division.pages["state"] <= most * (1 + 1e-9)
        return
    share = budget * rules.mamba_full_memory_ratio / (1 + rules.mamba_full_memory_ratio)
    # A share that rounding puts a hair above or below a whole state may go either way.
    assert division.pages["state"] == MIN_STATES or (division.pages["state"] + 1) * state <= share * (1 + 1e-9)


def test_a_windowed_pool_holds_one_request_however_small_the_ratio():
    costs = [Cost(KINDS[0], 10), Cost(KINDS[1], 10)]
    division = divide(costs, Rules(16, swa_full_tokens_ratio=0.001), 10_000)
    assert division.pages["window"] * 16 >= 40 + 16


def test_padding_is_part_of_the_budget():
    assert divide([Cost(KINDS[0], 100)], Rules(16), 299).tokens == 16
    assert divide([Cost(KINDS[0], 100)], Rules(16), 300).tokens == 32
    assert divide([Cost(KINDS[0], 100)], Rules(16), 199) is None


@pytest.mark.parametrize("answer", range(1, 9))
def test_largest(answer):
    assert largest(lambda n: n <= answer, 1, 8) == answer


def test_what_a_request_holds():
    """By hand, 100 tokens of which 10 are in computation, pages of 8."""
    pages = [request_pages(kind, 8, 100, 10) for kind in KINDS]
    assert pages == [13, -(-49 // 8) + 1, -(-34 // 8), 1]
    assert concurrency([Cost(kind, 1) for kind in KINDS], 8, 100, 10, 2 * sum(pages)) == 2
