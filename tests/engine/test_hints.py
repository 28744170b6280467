"""Hints are answered truly: quotas hold, what is retained is a hit at its next turn, and nothing stays pinned."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from rootcellar.cache import RadixCache, Tier, full
from rootcellar.cache.check import walk
from rootcellar.engine.hints import Hints, check_hints
from rootcellar.engine.metrics import TickTimes
from rootcellar.engine.pins import Pins
from rootcellar.engine.rates import Demand
from rootcellar.errors import RequestError
from rootcellar.scheduler import Prefetcher, PrefetchRules, Scheduler
from rootcellar.sim.trace import parse

PAGE = 16
TRACE = os.environ.get("ROOTCELLAR_AGENT_TRACE")


@dataclass
class Desk:
    """A cache, who pins in it, and requests that take their way through it at once."""

    tokens: int
    policy: str = "lru"
    now: float = 0.0
    hits: Counter = field(default_factory=Counter)

    def __post_init__(self):
        capacity = {("full", Tier.DEVICE): self.tokens}
        self.cache = RadixCache(
            [full("full")], page_size=PAGE, capacity=capacity, max_leases=4, max_length=self.tokens, policy=self.policy
        )
        self.scheduler = Scheduler(self.cache, chunked_prefill_size=512, max_running_requests=4)
        self.pins = Pins(self.cache, self.tokens)
        self.demand = Demand(self.tokens)
        self.ticks = TickTimes(0.0)
        self.hints = Hints(self.scheduler, self.pins, Prefetcher(self.scheduler, lambda _: []))

    def key(self, tokens):
        return self.scheduler.key(tokens, "")

    def serve(self, tokens, tenant="a"):
        """Compute a prompt; how many of its tokens were hits. None: it found no room."""
        self.pins.expire(self.now)
        self.hints.expire(self.now, self.demand.longest)
        key = self.key(tokens)
        hit = self.cache.match(key[: len(key) - 1])
        gone = self.cache.last_eviction(key[: len(key) - 1]) if hit.branch + PAGE < len(key) else None
        lease = self.cache.open(hit)
        if lease is None:
            return None
        if not self.cache.grow(lease, len(key) - lease.length):
            self.cache.close(lease)
            return None
        cached = lease.cached
        self.cache.commit(lease, key)
        self.cache.close(lease)
        self.ticks.note(self.cache.tick, self.now)
        age = None if gone is None else self.now - self.ticks.at(gone.tick)
        self.demand.note(len(key) - cached, age, self.now)
        self.pins.came(tenant, key)
        return cached

    def take(self, tokens, hints, tenant="a", share=1.0):
        key, longest = self.key(tokens), self.demand.longest
        replies = self.hints.take(tenant, key, check_hints(hints), share, self.now, longest)
        return {reply.hint: reply for reply in replies}

    def cached(self, tokens):
        """Tokens of a prompt that are there; nobody asks for it."""
        return self.cache.explain(self.key(tokens)).reaches[Tier.DEVICE]

    @property
    def pinned(self):
        return self.cache.stats().shelves["full", Tier.DEVICE].pinned

    @property
    def kept(self):
        """Tokens that count as kept: pinned or retained."""
        return self.tokens // 2 - self.pins.room("", 1.0)


def prompt(seed, n):
    return np.random.default_rng(seed).integers(0, 30_000, n)


def test_what_is_pinned_and_what_is_retained_stay_and_end():
    desk = Desk(2048)
    one, two = prompt(1, 256), prompt(2, 256)
    for tokens in (one, two):
        desk.serve(tokens)
    assert desk.take(one, {"pin": 10})["pin"].answer == "granted"
    assert desk.take(two, {"retain": 20})["retain"].tokens == 256
    for i in range(10):
        desk.serve(prompt(10 + i, 500))
    assert desk.serve(one) == desk.serve(two) == 240
    desk.now = 15.0
    desk.serve(prompt(30, 16))
    assert (desk.pinned, desk.kept) == (0, 256)
    assert desk.take(two, {"retain": 0})["retain"].answer == "granted"
    assert desk.kept == 0
    assert desk.take(two, {"retain": 0})["retain"].answer == "refused"
    for i in range(10):
        desk.serve(prompt(40 + i, 500))
    assert desk.serve(one) == desk.serve(two) == 0


def test_an_answer_says_what_is_clipped_and_why():
    desk = Desk(2048)
    desk.serve(prompt(1, 256))
    longer = desk.take(np.concatenate([prompt(1, 256), prompt(2, 64)]), {"pin": 60})["pin"]
    assert (longer.answer, longer.tokens, longer.why) == ("clipped", 256, "the rest is not cached")
    late = desk.take(prompt(1, 256), {"retain": 10**6})["retain"]
    assert (late.answer, late.seconds) == ("clipped", 3600.0)
    nothing = desk.take(prompt(3, 256), {"pin": 60})["pin"]
    assert (nothing.answer, nothing.tokens) == ("refused", 0)
    assert desk.take(prompt(1, 256), {"prefetch": True})["prefetch"].answer == "granted"
    assert desk.take(prompt(3, 256), {"prefetch": True})["prefetch"].answer == "refused"


def test_a_tenants_quota_holds_and_what_fits_of_a_prompt_is_kept():
    desk = Desk(2048)  # pins may hold 1024, each of two tenants 512
    for seed in range(3):
        desk.serve(prompt(seed, 320))
    assert desk.take(prompt(0, 320), {"pin": 60}, "a", 0.5)["pin"].answer == "granted"
    part = desk.take(prompt(1, 320), {"pin": 60}, "a", 0.5)["pin"]
    assert (part.answer, part.tokens) == ("clipped", 192)
    assert desk.take(prompt(2, 320), {"retain": 60}, "a", 0.5)["retain"].answer == "refused"
    assert desk.take(prompt(2, 320), {"retain": 60}, "b", 0.5)["retain"].answer == "granted"


def test_pins_take_the_place_of_what_the_tenant_only_retains():
    desk = Desk(1024)
    for seed in range(2):
        desk.serve(prompt(seed, 320))
    assert desk.take(prompt(0, 320), {"retain": 60})["retain"].answer == "granted"
    assert desk.take(prompt(1, 320), {"pin": 60})["pin"].answer == "granted"
    assert desk.pinned == desk.kept == 320
    assert desk.take(prompt(0, 320), {"retain": 60})["retain"].answer == "clipped"


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_what_is_retained_gives_way_to_a_request_that_finds_no_room_as_far_as_that_needs_and_what_is_wanted_last_first(
    policy,
):
    desk = Desk(1024, policy)
    for seed, seconds in ((0, 30), (1, 60)):
        desk.serve(prompt(seed, 256))
        assert desk.take(prompt(seed, 256), {"retain": seconds})["retain"].answer == "granted"
    assert desk.serve(prompt(2, 640)) == 0  # a quarter of what is retained is in its way
    assert desk.cached(prompt(0, 256)) == 256
    assert desk.cached(prompt(1, 256)) == 128
    assert desk.serve(prompt(3, 640)) == 0  # now the other one's own prompt is there to leave
    assert desk.cached(prompt(0, 256)) == 256


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_what_is_demoted_is_kept_no_longer_and_leaves_first(policy):
    desk = Desk(1024, policy)
    for seed in (1, 2):
        desk.serve(prompt(seed, 320))
    desk.take(prompt(2, 320), {"pin": 60, "retain": 60})
    assert desk.pinned == 320
    told = desk.take(prompt(2, 320), {"demote": True})["demote"]
    assert (told.answer, told.tokens, desk.pinned, desk.kept) == ("granted", 320, 0, 0)
    assert desk.serve(prompt(3, 640)) == 0
    assert desk.cached(prompt(1, 320)) == 320  # though it was used before the other
    assert desk.cached(prompt(2, 320)) == 64
    assert desk.take(prompt(9, 320), {"demote": True})["demote"].answer == "refused"


def test_a_demoted_prompt_leaves_what_others_go_on_from_and_is_as_before_once_it_is_asked_for():
    desk = Desk(2048)
    trunk = prompt(0, 320)
    one, two = (np.concatenate([trunk, prompt(seed, 160)]) for seed in (1, 2))
    desk.serve(one)
    desk.serve(two)
    told = desk.take(one, {"demote": True})["demote"]
    assert (told.answer, told.tokens, told.why) == ("clipped", 160, "others go on from the rest")
    assert desk.take(trunk, {"demote": True})["demote"].answer == "refused"
    desk.serve(prompt(3, 320))
    desk.serve(one)  # it was not over
    desk.serve(prompt(4, 1200))
    assert desk.cached(one) == 480
    assert desk.cached(two) < 480


def test_a_conversation_that_grows_is_retained_once():
    desk = Desk(2048)
    for n in (160, 320, 480):
        desk.serve(prompt(0, n))
        assert desk.take(prompt(0, n), {"retain": 60})["retain"].answer == "granted"
    assert desk.pins.room("a", 1.0) == 1024 - 480


def test_a_turn_that_came_is_waited_for_no_more_and_what_is_retained_till_a_time_is():
    desk = Desk(2048)
    for hint in ("next_turn", "retain"):
        desk.serve(prompt(0, 320))
        assert desk.take(prompt(0, 320), {hint: 60})[hint].answer == "granted"
        desk.serve(prompt(0, 400), "b")  # another tenant's
        assert desk.kept == 320
        desk.serve(prompt(0, 400))
        assert desk.kept == (0 if hint == "next_turn" else 320)


def test_what_is_soft_is_refused_and_given_up_where_others_want_the_room_sooner():
    desk = Desk(2048)
    for seed in (0, 1):
        desk.serve(prompt(seed, 320))
        assert desk.take(prompt(seed, 320), {"retain": (30, 2000)[seed]})["retain"].answer == "granted"
    for i in range(200):  # four prompts where there is room for three
        desk.now += 0.1
        desk.serve(prompt(10 + i % 4, 480))
    assert desk.kept == 0
    assert 0.2 < desk.demand.longest < 30
    for hint in ("retain", "next_turn"):
        told = desk.take(prompt(10, 480), {hint: 60})[hint]
        assert (told.answer, "sooner" in told.why, desk.kept) == ("refused", True, 0)
    assert desk.take(prompt(10, 480), {"retain": 0.2})["retain"].answer == "granted"
    assert desk.take(prompt(10, 480), {"pin": 60})["pin"].answer == "granted"


def store_desk(asked):
    """A desk with a store, that notes the prompts it is asked for."""
    desk = Desk(1024)
    desk.hints = Hints(desk.scheduler, desk.pins, Prefetcher(desk.scheduler, lambda _: []))
    desk.hints._prefetcher.open(PrefetchRules("best_effort", PAGE, lambda _: 1.0))
    desk.hints._prefetcher.bring = lambda request, now: asked.append(request.prompt_length) or True
    return desk


def test_a_turn_is_waited_for_once_and_undone():
    asked = []
    desk = store_desk(asked)
    for seconds in (30, 20, 10):
        assert desk.take(prompt(1, 256), {"next_turn": seconds})["next_turn"].answer == "deferred"
    assert desk.hints.next_end == 8.0
    desk.hints.expire(100.0)
    assert asked == [256]
    desk.serve(prompt(1, 256))
    assert desk.take(prompt(1, 256), {"next_turn": 10})["next_turn"].answer == "granted"
    assert desk.kept == 256
    assert desk.take(prompt(1, 256), {"next_turn": 0})["next_turn"].answer == "granted"
    assert (desk.kept, desk.hints.next_end) == (0, None)


def test_one_tenants_turns_leave_room_for_anothers_and_none_is_waited_for_for_years(monkeypatch):
    monkeypatch.setattr("rootcellar.engine.hints._TURN_TOKENS", 1024)
    desk = store_desk([])
    answers = [desk.take(prompt(i, 256), {"next_turn": 60}, "a", 0.5)["next_turn"].answer for i in range(4)]
    assert answers == ["deferred", "deferred", "refused", "refused"]
    assert desk.take(prompt(9, 256), {"next_turn": 60}, "b", 0.5)["next_turn"].answer == "deferred"
    assert desk.take(prompt(10, 64), {"next_turn": 1e8}, "b", 0.5)["next_turn"].answer == "refused"


def test_a_turn_of_other_weights_is_brought_no_more():
    asked = []
    desk = store_desk(asked)
    desk.scheduler.set_epoch("one")
    desk.take(prompt(1, 256), {"next_turn": 10})
    desk.scheduler.set_epoch("two")
    desk.hints.expire(100.0)
    assert asked == []


def test_wrong_hints_are_refused_with_what_is_known():
    for hints in (
        {},
        {"keep": 3},
        {"pin": "1"},
        {"pin": -1},
        {"demote": 1},
        {"retain": True},
        [],
        {"pin": float("nan")},
    ):
        with pytest.raises(RequestError, match="hints"):
            check_hints(hints)


@pytest.mark.parametrize("seed", range(2))
def test_nothing_stays_pinned_after_thousands_of_hints(seed):
    """5,000 hints each of tenants whose prompts share beginnings; the cache recounts its pins all the while."""
    desk, rng = Desk(4096), np.random.default_rng(seed)
    trunks = [prompt(seed * 10 + i, 400) for i in range(4)]
    names = ("pin", "retain", "next_turn", "demote", "prefetch")
    for step in range(5_000):
        desk.now += float(rng.exponential(0.5))
        tokens = trunks[rng.integers(4)][: int(rng.integers(1, 400))]
        if rng.random() < 0.5:
            tokens = np.concatenate([tokens, np.full(int(rng.integers(0, 100)), rng.integers(50))])
        desk.hints.expire(desk.now)
        desk.serve(tokens)
        name = names[rng.integers(5)]
        value = bool(rng.random() < 0.9) if name in ("demote", "prefetch") else float(rng.choice([0, 1, 10, 100]))
        tenant = "ab"[rng.integers(2)]
        desk.take(tokens, {name: value}, tenant, 0.5)
        assert desk.pins.room(tenant, 0.5) >= 0
        if step % 1000 == 0:
            desk.cache.check()
        if step == 2_500:
            desk.pins.forget()
            assert desk.pinned == desk.kept == 0
            assert expected(desk) == []
    desk.now += 10_000
    desk.pins.expire(desk.now)
    assert desk.pins.next_end is None
    assert desk.pinned == desk.kept == 0
    assert expected(desk) == []
    desk.cache.check()


def expected(desk):
    """The ids of nodes that the cache still expects somebody to ask for."""
    return [node.id for node in walk(desk.cache._inside().tree) if any(due > 0 for due in node.dues)]


def made_sessions():
    """Sessions with gaps, as (time, session, tokens): a coding agent's that grow, among many chats."""
    rng = np.random.default_rng(0)
    made = []
    for session in range(6):
        tokens, at = prompt(session, 200), float(rng.uniform(0, 20))
        for _ in range(8):
            made.append((at, session, tokens))
            tokens = np.concatenate([tokens, rng.integers(0, 30_000, int(rng.integers(20, 60)))])
            at += float(rng.uniform(20, 60))
    made += [(float(rng.uniform(0, 400)), None, rng.integers(0, 30_000, 300)) for _ in range(400)]
    return sorted(made, key=lambda each: each[0])


def recorded_sessions(most=4272):
    """The same of a recorded trace: a block of 512 tokens becomes a page; each second session matters."""
    with open(TRACE, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:most]
    requests, bad = parse(json.dumps(row) for row in rows)
    assert not bad
    sessions: dict[int, int] = {}
    made = []
    for row, request in zip(rows, requests, strict=True):
        ids = np.asarray(request.hash_ids)[: request.input_length // 512]
        if len(ids) < 2:
            continue
        last = next((sessions[block] for block in reversed(ids.tolist()) if block in sessions), len(sessions))
        sessions |= {int(block): last for block in ids.tolist() if block not in sessions}
        tokens = (ids[:, None] * PAGE + np.arange(PAGE)).ravel()
        made.append((row["timestamp"] / 1000, last if last % 2 == 0 else None, tokens))
    return made


def turns(sessions, tokens, *, counted=None, gap=0.0):
    """Of what a session's turns could hit of its turn before: the part that they did, and which turns were counted.

    Without ``counted`` each turn that comes after more than ``gap`` seconds is announced, and counts where that was
    granted.
    """
    desk, before, granted = Desk(tokens), {}, set()
    later: dict[int, list[float]] = {}
    for at, session, _ in reversed(sessions):
        later.setdefault(session, []).append(at)
    hit = wanted = 0
    for i, (at, session, now) in enumerate(sessions):
        desk.now = max(desk.now, at)
        cached = desk.serve(now)
        assert cached is not None  # what is retained is in nobody's way
        if session is None:
            continue
        later[session].pop()
        last, of = before.get(session, (None, None))
        if last is not None and (of in granted if counted is None else of in counted):
            same = now[: len(last)] == last[: len(now)]
            common = len(same) if same.all() else int(same.argmin())
            common = min(common, len(now) - 1) // PAGE * PAGE
            hit, wanted = hit + min(cached, common), wanted + common
        before[session] = now, i
        if counted is None and later[session] and later[session][-1] - at > gap:
            reply = desk.take(now, {"next_turn": later[session][-1] - at})["next_turn"]
            if reply.answer == "granted":
                granted.add(i)
        assert desk.kept <= tokens // 2
    return hit / wanted, granted


def test_retained_sessions_hit_at_their_next_turn_where_lru_loses_them():
    sessions = made_sessions()
    retained, granted = turns(sessions, 8192)
    assert len(granted) > 30
    assert retained > 0.95
    assert turns(sessions, 8192, counted=granted)[0] < 0.3


def busy_sessions():
    """Sessions that come back after seconds and fill the cache nearly, and others that come back after minutes."""
    rng = np.random.default_rng(1)
    made = []
    for session in range(36):
        tokens, at = prompt(session, 320), float(rng.uniform(0, 30))
        while at < 2_000:
            made.append((at, session, tokens))
            tokens = np.concatenate([tokens, rng.integers(0, 30_000, 16)])[-640:]
            if len(tokens) >= 624:
                tokens = rng.integers(0, 30_000, 320)
            at += float(rng.uniform(300, 600) if session < 12 else rng.exponential(20))
    return sorted(made, key=lambda each: each[0])


def whole(sessions, tokens, gap):
    """The part of all prompts that was a hit; turns after more than ``gap`` seconds are announced."""
    desk, later = Desk(tokens), {}
    for at, session, _ in reversed(sessions):
        later.setdefault(session, []).append(at)
    hit = asked = 0
    answers = Counter()
    for at, session, now in sessions:
        desk.now = at
        later[session].pop()
        hit, asked = hit + desk.serve(now), asked + len(now)
        if later[session] and later[session][-1] - at > gap:
            answers[desk.take(now, {"next_turn": later[session][-1] - at})["next_turn"].answer] += 1
    return hit / asked, answers


@pytest.mark.parametrize("tokens", [9_600, 12_800])
def test_hints_cost_all_prompts_together_nothing(tokens):
    """Where others ask for the room sooner, it is theirs: what is announced costs no more than it saves."""
    hinted, answers = whole(busy_sessions(), tokens, 200)
    plain, _ = whole(busy_sessions(), tokens, math.inf)
    assert hinted > plain - 0.01  # 0.08 to 0.2 where all that is announced is kept
    assert answers["refused"] > 10


@pytest.mark.skipif(not TRACE, reason="ROOTCELLAR_AGENT_TRACE names no trace of agents' sessions in Mooncake's form")
def test_retained_sessions_of_a_recorded_trace():
    """A thirty-second of its size, with its real gaps: turns after more than five minutes, others' requests between;
    and all prompts together.
    """
    sessions = recorded_sessions()
    retained, granted = turns(sessions, 20_000, gap=300)
    assert len(granted) > 90
    assert retained > 0.99
    assert turns(sessions, 20_000, counted=granted)[0] < 0.9
    assert whole(sessions, 20_000, 300)[0] > whole(sessions, 20_000, math.inf)[0] - 0.002
