"""Arenas: how layers are grouped, how much fits, and that the planner's figure is what a real cache reaches."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.cache.kind import Kind, chunked_local, full, recurrent, sliding_window
from rootcellar.plan.arena import MOST_GROUPS, group
from rootcellar.plan.capacity import Ask, capacity
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.presets import PRESETS
from rootcellar.plan.sizing import ARENA, Cost, Rules, divide, longest_request, smallest
from rootcellar.sim.mix import MemoryBudget, arena_cache, best_split, fitting_tokens, longest, mixed_load, split_cache

unhurried = settings(deadline=None, max_examples=200)
BYTES = 1000

# Each preset with fewer layers in the same proportion (or nearly), and a smaller span: (layers, span).
SHRUNKEN = {"llama-4-scout": (8, 512), "gemma-3-27b": (12, 64), "gpt-oss-120b": (8, 32)}


def shrunken(name):
    layers, span = SHRUNKEN[name]
    config = copy.deepcopy(PRESETS[name])
    text = config.get("text_config", config)
    text["num_hidden_layers"] = layers
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    text["attention_chunk_size" if "attention_chunk_size" in text else "sliding_window"] = span
    return read_architecture(config)


def budget_of(name, page_size, nbytes=8 * 20_000 * BYTES, inflight=32):
    kinds = tuple(g.kind for g in shrunken(name).groups)
    return MemoryBudget(kinds, BYTES * page_size, nbytes, Rules(page_size, inflight=inflight))


def test_groups_of_the_known_models():
    found = {}
    for name in SHRUNKEN:
        kinds = [g.kind for g in read_architecture(PRESETS[name]).groups]
        grouping = group(kinds, dict.fromkeys((k.name for k in kinds), BYTES))
        found[name] = (grouping.layers, [len(k.layers) for k in grouping.kinds])
    assert found == {
        "llama-4-scout": (12, [12, 12, 12, 12]),
        "gemma-3-27b": (5, [5] * 10 + [4] * 3),
        "gpt-oss-120b": (18, [18, 18]),
    }


@unhurried
@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_every_layer_is_in_one_group_and_none_is_too_large(counts):
    kinds, first = [], 0
    for i, count in enumerate(counts):
        layers = tuple(range(first, first + count))
        kinds.append(full(f"k{i}", layers) if i == 0 else sliding_window(f"k{i}", layers, window=4))
        first += count
    kinds.append(recurrent("state", (first,)))
    grouping = group(kinds, {k.name: BYTES for k in kinds})
    assert sorted(layer for k in grouping.kinds for layer in k.layers) == list(range(first + 1))
    assert max(len(k.layers) for k in grouping.kinds if k.name in grouping.members) == grouping.layers
    assert len(grouping.members) <= max(MOST_GROUPS, len(counts))
    assert grouping.kinds[-1] == kinds[-1]
    assert "state" not in grouping.members


def test_kinds_whose_pages_differ_do_not_share():
    kinds = [full("full", (0,)), sliding_window("window", (1,), window=4)]
    assert group(kinds, {"full": 10, "window": 20}) is None
    assert group(kinds[:1], {"full": 10}) is None


@unhurried
@given(
    page_size=st.sampled_from([1, 4, 16]),
    budget=st.integers(0, 9000),
    most=st.none() | st.integers(1, 300),
    states=st.booleans(),
)
def test_an_arena_takes_no_more_than_the_budget_and_leaves_no_page(page_size, budget, most, states):
    kinds = [full("full", (0,)), sliding_window("window", (1,), window=40)]
    costs = [Cost(kind, 10) for kind in kinds] + [Cost(recurrent("state", (2,)), 7)] * states
    rules = Rules(page_size, max_total_tokens=most, inflight=8, arena=("full", "window"))
    division = divide(costs, rules, budget)
    if division is None:
        pages = 2 if most is None else 2 * (most // page_size)
        assert pages == 0 or budget < (pages + 1) * 10 + 3 * 7 * states == smallest(costs, rules)
        return
    taken = (division.pages[ARENA] + 1) * 10 + (division.pages.get("state", -1) + 1) * 7
    assert division.nbytes == taken <= budget
    if most is None and not states:
        assert taken + 10 > budget
    if most is not None:
        assert division.tokens <= most


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", SHRUNKEN)
def test_one_request_grows_as_long_as_the_planner_says(name, page_size):
    """Hybrid in an arena, and all layers full: the cache itself is asked, a step of 32 tokens at a time."""
    size = 8 * (3000 if page_size == 1 else 20_000) * BYTES
    budget = budget_of(name, page_size, size)
    cache, division = arena_cache(budget)
    reached = longest(cache, 32)
    assert reached == division.tokens
    cache.check()
    layers = tuple(range(sum(len(k.layers) for k in budget.kinds)))
    flat, flat_division = split_cache(replace(budget, kinds=(full("full", layers),)))
    assert longest(flat, 32) == flat_division.tokens
    hybrid_layers = len(budget.kinds[0].layers)
    gain, most = reached / flat_division.tokens, len(layers) / hybrid_layers
    assert 0.85 * most < gain <= most, (gain, most)  # the span takes the rest


@pytest.mark.parametrize("name", SHRUNKEN)
def test_a_mixed_load_fits_better_than_under_the_best_static_split(name):
    span = SHRUNKEN[name][1]
    budget = budget_of(name, 16, inflight=span // 2)
    load = mixed_load(1, 8, (span // 2, 2 * span), (20 * span, 40 * span))
    cache, _ = arena_cache(budget)
    shared = fitting_tokens(cache, load, span // 2)
    cache.check()
    ratio, split = best_split(budget, load, span // 2, [2 ** (-i / 2) for i in range(12)])
    assert shared >= 1.15 * split, (shared, split, ratio)


def test_longest_request_by_trying():
    kinds = [full("full"), chunked_local("chunk", chunk=24), sliding_window("window", window=10)]
    for pages in range(3, 60):
        rules = Rules(4, inflight=8)
        found = longest_request(kinds, pages, rules)
        done = 0
        while True:
            ends = [n for n in range(done + 4, done + 9, 4) if _held(kinds, done, n, 4) <= pages]
            if not ends:
                break
            done = max(ends)
            if done % 8:
                break
        assert found == done, pages


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["full", "chunk", "window"]), min_size=1, max_size=4),
    st.integers(1, 90), st.sampled_from([1, 4, 16]), st.integers(1, 40), st.integers(4, 3000),
)  # fmt: skip
def test_longest_request_is_where_a_walk_from_the_start_ends(rules_of, span, size, inflight, pages):
    make = {
        "full": full,
        "chunk": lambda n: chunked_local(n, chunk=span),
        "window": lambda n: sliding_window(n, window=span),
    }
    kinds = [full("full"), *(make[rule](f"{rule}.{i}") for i, rule in enumerate(rules_of))]
    step, done = -(-inflight // size), 0
    while (more := (pages - _held(kinds, done * size, done * size, size)) // len(kinds)) >= step:
        done += step
    assert longest_request(kinds, pages, Rules(size, inflight=inflight)) == (done + more) * size


def test_longest_request_takes_no_time_that_grows_with_memory_and_ends_without_a_full_kind():
    calls = []

    class Counting(Kind):
        def start(self, n):
            calls.append(n)
            return super().start(n)

    kinds = [Counting("full", (), "full"), sliding_window("window", window=1024)]
    found = longest_request(kinds, 10**9, Rules(1, inflight=16))
    assert 10**9 - 2 * (1024 + 16) <= found < 10**9
    assert len(calls) < 200
    windows = [sliding_window("a", window=10), sliding_window("b", window=30)]
    assert longest_request(windows, 1000, Rules(1, inflight=16)) == 500
    assert longest_request(windows, 40, Rules(1, inflight=16)) < 40


def _held(kinds, done, end, size):
    return sum(len(range(kind.start(done) // size, -(-end // size))) for kind in kinds)


def test_the_planner_gives_both():
    ask = Ask(read_architecture(PRESETS["gpt-oss-120b"]), kv_bytes_per_device=10 * 10**9, page_size=16)
    figures = capacity(ask)
    assert figures.arena_groups == {"full": 18, "window": 18}
    assert 1.9 * figures.max_total_num_tokens < figures.arena_longest_request < 2 * figures.max_total_num_tokens
    assert (figures.arena_pages + 1) * 16 * 36864 <= 10 * 10**9
    assert capacity(Ask(read_architecture(PRESETS["qwen2.5-3b"]), kv_bytes_per_device=10**9)).arena_groups is None
