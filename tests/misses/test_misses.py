"""Causes that were injected are found, at their place, with the price that was measured: the tokens that the same
request computes less where the cause is not there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from desk import RATE, Desk

from rootcellar.cache import Tier, chunked_local, full, recurrent, sliding_window
from rootcellar.misses import Cause, Earlier, Past, costliest
from rootcellar.scheduler.placeholders import placeholder_ids

KINDS = {
    "full": [full("full")],
    "window": [full("full"), sliding_window("window", window=48)],
    "chunked": [full("full"), chunked_local("chunked", chunk=64)],
    "recurrent": [full("full"), recurrent("state")],
}
TIERS = {
    "device": {"device": 2048},
    "host": {"device": 2048, "host": 4096},
    "storage": {"device": 2048, "host": 4096, "storage": 16384},
}
VOCABULARY = 30_000


@dataclass
class Case:
    """One way to spoil a hit. ``desk``; ``rng``; ``inject``: whether it is spoiled."""

    desk: Desk
    rng: np.random.Generator
    inject: bool
    tiers: str
    kinds: str

    def words(self, low, high=None):
        n = low if high is None else int(self.rng.integers(low, high))
        return self.rng.integers(10, VOCABULARY, n)

    def tail(self):
        """What an earlier prompt ends with that the later one has not; a state is left where a prompt ends."""
        return self.words(0) if self.kinds == "recurrent" else self.words(20, 40)

    def join(self, *parts):
        return np.concatenate([np.asarray(part, np.int64) for part in parts])


def first_seen(case):
    case.desk.serve(case.words(200, 400))
    return case.desk.serve(case.words(200, 400)), 0


def evicted(case):
    old, asked = case.words(200, 500), case.words(20, 40)
    case.desk.serve(old)
    if case.inject:
        for tier in Tier:
            if (("full", tier)) in case.desk.cache.stats().shelves:
                case.desk.evict(tier)
    return case.desk.serve(case.join(old, asked)), 0


def evicted_in_part(case):
    """By others who need the room: the end leaves first."""
    old, asked = case.words(600, 700), case.words(20, 40)
    case.desk.serve(old)
    room = 2048 - 300
    if case.inject:
        case.desk.serve(case.words(room))
        case.desk.evict(Tier.HOST) if case.tiers != "device" else None
        case.desk.evict(Tier.STORAGE) if case.tiers == "storage" else None
    return case.desk.serve(case.join(old, asked), load=Tier.DEVICE), None


def forgotten(case):
    old, asked = case.words(200, 500), case.words(20, 40)
    case.desk.serve(old)
    if case.inject:
        case.desk.flush()
    return case.desk.serve(case.join(old, asked)), 0


def other_namespace(case):
    old, asked = case.words(200, 500), case.words(20, 40)
    case.desk.serve(old, namespace="w/cache_salt=a")
    others = ("w/cache_salt=b", "w/", "w/cache_salt=a&extra_key=x", "v/cache_salt=a")
    other = others[int(case.rng.integers(len(others)))]
    return case.desk.serve(case.join(old, asked), namespace=other if case.inject else "w/cache_salt=a"), 0


def prompt_changed(case):
    head, was, now, rest = case.words(30, 100), case.words(60, 90), case.words(60, 90), case.words(200, 300)
    case.desk.serve(case.join(head, was, rest, case.tail()))
    asked = case.words(20, 40)
    return case.desk.serve(case.join(head, now if case.inject else was, rest, asked)), len(head)


def changing_value(case):
    head, rest = case.words(0, 100), case.words(200, 400)
    was, now = case.words(1, 12), case.words(1, 12)
    case.desk.serve(case.join(head, was, rest, case.tail()))
    asked = case.words(20, 40)
    return case.desk.serve(case.join(head, now if case.inject else was, rest, asked)), len(head)


def reordered(case):
    head, rest = case.words(20, 60), case.words(40, 80)
    parts = [case.words(40, 70) for _ in range(5)]
    case.desk.serve(case.join(head, *parts, rest, case.tail()))
    asked = case.words(20, 40)
    order = [4, 2, 0, 3, 1] if case.inject else range(5)
    return case.desk.serve(case.join(head, *(parts[i] for i in order), rest, asked)), len(head)


def image_differs(case):
    head, rest = case.words(40, 90), case.words(100, 200)
    was, now = (placeholder_ids(case.rng.bytes(8), 64) for _ in range(2))
    case.desk.serve(case.join(head, was, rest, case.tail()))
    asked = case.words(20, 40)
    return case.desk.serve(case.join(head, now if case.inject else was, rest, asked)), len(head)


def state_gone(case):
    old, asked = case.words(64 * int(case.rng.integers(3, 8)) + 40), case.words(20, 40)  # not the end of a chunk
    case.desk.serve(old)
    if case.inject:
        kind = {"window": "window", "chunked": "chunked", "recurrent": "state"}[case.kinds]
        for tier in Tier:
            if (kind, tier) in case.desk.cache.stats().shelves:
                case.desk.evict(tier, kind)
    return case.desk.serve(case.join(old, asked)), None


def loading_slower(case):
    old, asked = case.words(200, 500), case.words(20, 40)
    case.desk.serve(old)
    case.desk.evict()
    return case.desk.serve(case.join(old, asked), load=Tier.DEVICE if case.inject else Tier.STORAGE), 0


def store_lost(case):
    old, asked = case.words(200, 500), case.words(20, 40)
    case.desk.serve(old)
    case.desk.evict()
    if case.tiers == "storage":
        case.desk.evict(Tier.HOST)
    return case.desk.serve(case.join(old, asked), fail=case.inject), 0


def logprobs(case):
    old, asked = case.words(200, 500), case.words(20, 40)
    case.desk.serve(old)
    start = int(case.rng.integers(20, 100))
    miss = case.desk.serve(case.join(old, asked), logprobs_from=start if case.inject else None)
    return miss, None


ALL, BEYOND, HYBRID = tuple(TIERS), ("host", "storage"), ("window", "chunked", "recurrent")
SCENES = [
    (first_seen, Cause.FIRST_SEEN, ALL, KINDS, 1),
    (evicted, Cause.EVICTED, ALL, KINDS, 1),
    (evicted_in_part, Cause.EVICTED, ALL, ("full",), 2),
    (forgotten, Cause.FORGOTTEN, ALL, KINDS, 1),
    (other_namespace, Cause.OTHER_NAMESPACE, ALL, KINDS, 1),
    (prompt_changed, Cause.PROMPT_CHANGED, ALL, KINDS, 1),
    (changing_value, Cause.CHANGING_VALUE, ALL, KINDS, 3),
    (reordered, Cause.REORDERED, ALL, KINDS, 1),
    (image_differs, Cause.IMAGE_DIFFERS, ALL, KINDS, 1),
    (state_gone, Cause.STATE_GONE, ALL, HYBRID, 1),
    (loading_slower, Cause.LOADING_SLOWER, BEYOND, KINDS, 1),
    (store_lost, Cause.STORE_LOST, BEYOND, KINDS, 1),
    (logprobs, Cause.LOGPROBS, ALL, ("full",), 1),
]


def run(scene, tiers, kinds, seed, inject):
    page_size = (4, 16)[seed % 2]
    desk = Desk(KINDS[kinds], page_size, **TIERS[tiers])
    return scene(Case(desk, np.random.default_rng(seed), inject, tiers, kinds))


def injected():
    """All of them: (name, whether cause, place and price were right)."""
    seed = 0
    for scene, cause, tiers, kinds, times in SCENES:
        for tier, kind, _ in itertools.product(tiers, kinds, range(times)):
            seed += 1
            miss, place = run(scene, tier, kind, seed, True)
            without, _ = run(scene, tier, kind, seed, False)
            price = 0 if scene is first_seen else without.cached_tokens - miss.cached_tokens
            right = (
                miss.cause is cause
                and miss.position == (miss.cached_tokens if place is None else place)
                and miss.tokens == price
                and miss.seconds == pytest.approx(price / RATE)
            )
            yield (scene.__name__, tier, kind, seed), right, (miss, price, place)


def test_injected_causes_are_found_at_their_place_with_their_price():
    found = list(injected())
    wrong = [
        (name, miss.cause, miss.position, place, miss.tokens, price)
        for name, right, (miss, price, place) in found
        if not right
    ]
    assert len(found) >= 150
    assert not wrong
    assert set(Cause) - {each[2][0].cause for each in found} == {Cause.NOTHING, Cause.PAGE_ROUNDING}


def test_what_does_not_fill_a_page_costs_what_smaller_pages_would_save():
    rng = np.random.default_rng(0)
    shared, one, two = (
        rng.integers(10, VOCABULARY, 60),
        rng.integers(10, VOCABULARY, 40),
        rng.integers(10, VOCABULARY, 40),
    )
    cached = {}
    for page_size in (64, 1):
        desk = Desk(KINDS["full"], page_size, device=2048)
        desk.serve(np.concatenate([shared, one]))
        miss = desk.serve(np.concatenate([shared, two]))
        cached[page_size] = miss.cached_tokens
        if page_size == 64:
            assert (miss.cause, miss.position, miss.tokens) == (Cause.PAGE_ROUNDING, 0, 60)
    assert cached == {64: 0, 1: 60}


def test_a_conversation_that_grows_has_nothing_to_explain():
    desk, rng = Desk(KINDS["full"], 16, device=2048), np.random.default_rng(0)
    prompt = rng.integers(10, VOCABULARY, 320)
    for _ in range(4):
        miss = desk.serve(prompt)
        assert miss.cause in (Cause.FIRST_SEEN, Cause.PAGE_ROUNDING, Cause.NOTHING)
        assert miss.tokens < 16
        prompt = np.concatenate([prompt, rng.integers(10, VOCABULARY, 80)])
    again = desk.serve(prompt[:320])  # of which the last token is computed in any case
    assert (again.cause, again.cached_tokens, again.tokens) == (Cause.PAGE_ROUNDING, 304, 15)
    assert desk.serve(prompt[:321]).cause is Cause.NOTHING


def test_an_eviction_is_told_with_whose_room_it_was():
    desk, rng = Desk(KINDS["full"], 16, device=1024), np.random.default_rng(1)
    old = rng.integers(10, VOCABULARY, 400)
    desk.serve(old)
    desk.serve(rng.integers(10, VOCABULARY, 1000))
    miss = desk.serve(old)
    assert miss.cause is Cause.EVICTED
    assert "for r2" in miss.detail
    assert "DEVICE" in miss.detail


def test_a_tenant_is_compared_with_its_own_prompts_alone():
    desk, rng = Desk(KINDS["full"], 16, device=2048), np.random.default_rng(2)
    prompt = rng.integers(10, VOCABULARY, 300)
    desk.serve(prompt, namespace="w/tenant=a", tenant="a")
    miss = desk.serve(prompt, namespace="w/tenant=b", tenant="b")
    assert (miss.cause, miss.tokens, miss.than) == (Cause.FIRST_SEEN, 0, "")


def test_what_is_remembered_is_bounded_and_who_has_most_gives_way():
    past = Past(prompts=10, tokens=1000)
    for i in range(50):
        past.add("many", Earlier(f"m{i}", np.full(90, i), "", 0))
        if i < 2:
            past.add("few", Earlier(f"f{i}", np.full(90, -i), "", 0))
    assert [prompt.rid for prompt in past.of("few")] == ["f1", "f0"]
    assert len(list(past.of("many"))) == 8
    assert next(prompt.rid for prompt in past.of("many")) == "m49"


def test_costs_are_summed_by_habit():
    desk, rng = Desk(KINDS["full"], 16, device=4096), np.random.default_rng(3)
    apps = [(rng.integers(10, VOCABULARY, 50), rng.integers(10, VOCABULARY, 200)) for _ in range(2)]
    misses = []
    for i in range(20):
        head, rest = apps[i % 2]
        misses.append(desk.serve(np.concatenate([head, rng.integers(10, VOCABULARY, 3), rest])))
    habits = costliest(misses)
    assert [(habit.cause, habit.requests) for habit in habits] == [(Cause.CHANGING_VALUE, 9)] * 2
    assert sum(habit.tokens for habit in habits) == sum(miss.tokens for miss in misses)
    assert Counter(habit.example.position for habit in habits) == Counter({50: 2})
