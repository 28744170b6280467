"""What a store has of waiting prompts: it comes to the host, or is computed, and nobody waits for nothing."""

import random
from collections import Counter

import numpy as np
import pytest
from simulated import World

from rootcellar.cache import Tier, full, recurrent, sliding_window
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Loads, PrefetchRules, Rates, Request, Stage, TierRate
from rootcellar.scheduler.loads import MEASURED_AGAIN

PROMPT = list(range(10, 42))


def world(policy="wait_complete", threshold=4, limit=5.0, **options):
    """One in which the store alone has ``PROMPT``, and the cache has to ask."""
    made = World(
        tokens=128, host=128, storage=512, prefetch=PrefetchRules(policy, threshold, lambda tokens: limit), **options
    )
    made.add(PROMPT, 1)
    made.run()
    made.land()
    made.cache.flush()
    return made


def forget(made):
    for tier in (Tier.DEVICE, Tier.HOST):
        for kind in made.cache.kinds:
            assert made.cache.make_room(kind.name, made.cache.stats().shelves[kind.name, tier].size, tier)


def wait(made, request):
    """Let all copies happen until ``request`` starts."""
    for _ in range(20):
        made.step()
        if request.stage is not Stage.PREFILL_WAITING:
            return
        made.land()
    raise AssertionError("it waits for ever")


def test_what_the_store_has_is_loaded_and_counts_as_the_stores():
    made = world()
    request = made.add([*PROMPT, 1, 2, 3], 4)
    made.step()
    assert request.stage is Stage.PREFILL_WAITING
    assert made.scheduler.awaits_bytes
    wait(made, request)
    made.run()
    assert request.cached_by_tier == {"device": 0, "host": 0, "storage": 32}
    assert [(d.tier, d.tokens, d.load) for d in request.decisions] == [(Tier.STORAGE, 32, True), (Tier.HOST, 32, True)]
    made.verify()


def test_what_is_known_to_be_there_is_not_asked_for():
    made = world()
    wait(made, made.add(PROMPT, 4))
    made.run()
    made.land()
    forget(made)
    request = made.add(PROMPT, 4)
    assert not made.prefetcher.questions()
    wait(made, request)
    made.run()
    assert request.cached_by_tier == {"device": 0, "host": 0, "storage": 28}
    made.verify()


def test_others_run_meanwhile_and_who_is_aborted_leaves_nothing():
    made = world()
    held, other = made.add(PROMPT, 4), made.add([1, 2, 3], 4)
    made.step()
    assert made.copies.answer()
    while other.finish is None:
        made.step()
    assert held.stage is Stage.PREFILL_WAITING
    made.abort(held)
    assert not made.prefetcher.waiting
    made.land()
    again = made.add(PROMPT, 4)
    made.run()
    assert again.cached_by_tier == {"device": 0, "host": 28, "storage": 0}  # what came for the other was kept
    made.verify()


def test_best_effort_waits_for_nothing():
    made = world("best_effort")
    request = made.add(PROMPT, 4)
    made.step()
    assert request.stage is not Stage.PREFILL_WAITING
    made.run()
    assert request.cached == 0
    made.verify()


def test_what_is_expected_comes_to_the_host_before_it_is_asked_for():
    made = world("wait_complete")
    wish = Request.new("hint", np.asarray([*PROMPT, 1]), SamplingParams(max_new_tokens=1))
    assert made.prefetcher.bring(wish, made.now)
    for _ in range(3):
        made.step()
        made.land()
    assert not made.prefetcher.waiting
    assert made.cache.match(wish.key(len(PROMPT))).reach(Tier.HOST) == 32
    assert not made.prefetcher.bring(wish, made.now)
    request = made.add([*PROMPT, 1], 2)
    made.run()
    assert request.cached_by_tier["host"] == 32
    made.verify()


def test_a_request_waits_until_its_time_is_over_and_what_comes_later_is_kept():
    made = world("timeout", limit=3.0)
    request = made.add(PROMPT, 4)
    assert made.prefetcher.next_end == made.now + 3
    for _ in range(2):
        made.step()
        assert request.stage is Stage.PREFILL_WAITING
    made.step()
    assert request.stage is not Stage.PREFILL_WAITING
    made.run()
    made.land()
    made.verify()


@pytest.mark.parametrize("broken", ["asking", "reading", "lost"])
def test_a_store_that_fails_costs_the_tokens_and_nothing_else(broken):
    made = world()
    request = made.add(PROMPT, 4)
    made.step()
    if broken == "asking":
        made.copies.answer(ok=False)
    else:
        made.copies.answer()
        if broken == "lost":
            made.copies.stored.clear()
        made.step()
        assert made.copies.finish(ok=broken == "lost", dst=Tier.HOST)
    made.run()
    assert request.cached == 0
    made.verify()


def test_when_the_store_goes_nobody_waits_for_it():
    made = world()
    request = made.add(PROMPT, 4)
    made.step()
    made.prefetcher.close()
    made.step()
    assert request.stage is not Stage.PREFILL_WAITING
    made.run()
    made.add(PROMPT, 4)
    assert not made.prefetcher.questions()
    made.run()
    made.verify()


def depend(made, handle, prompt=(*PROMPT, 1, 2, 3)):
    request = made.add(prompt, 4)  # asks as others do
    made.abort(request)
    made.prefetcher.questions()
    request = Request.new("depends", np.asarray(prompt), SamplingParams(max_new_tokens=4), depends=handle)
    made.requests.append(request)
    made.scheduler.add(request)
    made.prefetcher.arrived(request, made.now)
    return request


def checkpoint(made, prompt):
    """One that a request left, and that nobody has written down yet."""
    request = made.add(prompt, 1)
    request.checkpoint = True
    made.run()
    made.prefetcher.ended(request)
    return request.handle


def test_a_checkpoint_is_waited_for_until_the_store_has_it_all():
    made = world("best_effort", limit=1000.0)
    handle = checkpoint(made, [*PROMPT[::-1], 5, 5])
    request = depend(made, handle, (*PROMPT[::-1], 5, 5, 5))
    for _ in range(3):
        made.step()
        made.copies.answer()
    assert request.stage is Stage.PREFILL_WAITING
    assert request.dependency is None
    while made.copies.finish():
        made.step()
        made.copies.answer()
    wait(made, request)
    assert request.dependency == "stored"
    made.run()
    made.verify()


@pytest.mark.parametrize("policy", ["best_effort", "wait_complete", "timeout"])
def test_a_checkpoint_that_cannot_come_is_not_waited_for_and_what_lacks_is_computed(policy):
    made = world(policy)
    handle = checkpoint(made, PROMPT[::-1])
    made.dispatch()
    while made.copies.finish(ok=False):
        made.learn(made.copies.reports())
        made.dispatch()
    for lost in (handle, "00" * 32):
        request = depend(made, lost, PROMPT[::-1])
        wait(made, request)
        assert request.dependency == "recomputed"
        made.run()
    made.verify()


def test_a_checkpoint_is_not_waited_for_beyond_its_time_or_without_a_store():
    made = world("wait_complete", limit=3.0)
    request = depend(made, checkpoint(made, PROMPT[::-1]), [*PROMPT[::-1], 4])
    for _ in range(2):
        made.step()
        assert request.stage is Stage.PREFILL_WAITING
    made.step()
    assert request.dependency == "recomputed"
    made.run()
    made.prefetcher.close()
    request = depend(made, "00" * 32)
    assert request.dependency == "recomputed"
    made.run()
    made.verify()


def test_little_is_not_asked_for():
    made = world(threshold=33)
    made.add(PROMPT, 4)
    assert not made.prefetcher.questions()
    made.run()
    made.verify()


def test_what_comes_slower_than_it_is_computed_is_computed():
    made = world(rates=Rates(100.0, TierRate(1e9), TierRate(8.0)))
    request = made.add(PROMPT, 4)
    made.run()
    (decision,) = request.decisions
    assert (decision.tier, decision.tokens, decision.load) == (Tier.STORAGE, 28, False)
    assert decision.load_seconds == pytest.approx(28 * 8 / 8, rel=1e-3)
    assert decision.compute_seconds == pytest.approx(0.28)
    assert request.cached == 0
    made.verify()


def test_the_host_too_is_left_alone_where_computing_is_sooner():
    made = world()
    wait(made, made.add(PROMPT, 1))
    made.run()
    assert made.cache.make_room("full", 128)
    made.scheduler.loads.learn(Rates(1000.0, TierRate(10.0), TierRate(1e9)), 0.0)
    request = made.add([*PROMPT, 1], 4)
    made.run()
    assert request.cached == 0
    assert [(d.tier, d.load) for d in request.decisions][-1] == (Tier.HOST, False)
    made.verify()


def test_times_are_those_of_the_bytes_that_the_kinds_need_and_of_what_waits_before():
    kinds = [full("full", (0,)), sliding_window("window", (1,), 9), recurrent("state", (2,))]
    loads = Loads(kinds, 4, {"full": 100, "window": 10, "state": 7})
    assert loads.weigh(Tier.HOST, 0, 40).load  # nothing was measured
    loads.learn(Rates(10.0, TierRate(100.0, queued=50), TierRate(50.0, queued=20)), 0.0)
    nbytes = 10 * 100 + 2 * 10 + 7  # all pages, those of the last 8 tokens, one state
    host = loads.weigh(Tier.HOST, 0, 40)
    assert (host.nbytes, host.load_seconds, host.compute_seconds) == (nbytes, (50 + nbytes) / 100, 4.0)
    storage = loads.weigh(Tier.STORAGE, 0, 40)
    assert storage.load_seconds == pytest.approx((20 + nbytes) / 50 + (50 + nbytes) / 100)
    assert not storage.load
    assert loads.weigh(Tier.HOST, 20, 40).nbytes == 5 * 100 + 20 + 7


def test_a_tier_that_was_slow_is_tried_again_after_a_while():
    loads = Loads([full("full", (0,))], 4, {"full": 100})
    slow = Rates(10.0, TierRate(1.0, at=5.0), TierRate(1.0, at=5.0))
    loads.learn(slow, 6.0)
    assert not loads.weigh(Tier.HOST, 0, 40).load
    loads.learn(slow, 5.0 + MEASURED_AGAIN + 1)
    assert loads.weigh(Tier.HOST, 0, 40).load
    assert loads.weigh(Tier.STORAGE, 0, 40).load


def walk(seed, steps):
    """A world in which everything may happen at any time; what did."""
    rng = random.Random(seed)
    page, chunk, running = rng.choice([1, 2, 4, 8]), rng.randint(4, 20), rng.randint(1, 5)
    policy = rng.choice(["best_effort", "wait_complete", "timeout"])
    window = rng.choice([None, sliding_window("window", (1,), rng.randint(2, 30))])
    made = World(
        tokens=rng.randrange(96, 200),
        page_size=page,
        chunk=chunk,
        running=running,
        window=window,
        window_tokens=0 if window is None else 400,
        host=rng.choice([64, 256]),
        storage=rng.choice([256, 2048]),
        overlap=rng.random() < 0.5,
        prefetch=PrefetchRules(policy, rng.choice([1, 8]), lambda tokens: 6.0),
        rates=rng.choice([Rates(), Rates(), Rates(1.0, TierRate(1e6), TierRate(1e-3))]),
    )
    prompts = [[rng.randrange(50) for _ in range(rng.randint(8, 40))] for _ in range(4)]
    seen = Counter()
    for step in range(steps):
        act = rng.random()
        if act < 0.12 and len(made.scheduler.waiting) < 6:
            shared = rng.choice(prompts)
            own = [rng.randrange(50) for _ in range(rng.randrange(6))]
            made.add(shared[: rng.randint(1, len(shared))] + own, rng.randrange(12))
        elif act < 0.14 and (alive := [r for r in made.requests if r.finish is None]):
            made.abort(rng.choice(alive))
        elif act < 0.17:
            forget_some(made, Tier.DEVICE)
            forget_some(made, Tier.HOST)
        elif act < 0.175 and made.copies.stored:
            del made.copies.stored[rng.choice(sorted(made.copies.stored))]
        elif act < 0.5:
            made.copies.finish(ok=rng.random() < 0.9, dst=rng.choice([None, *Tier][:4]))
        elif act < 0.6:
            made.copies.answer(ok=rng.random() < 0.9)
        elif made.step() is None:
            assert made.scheduler.idle or made.scheduler.awaits_bytes
        if step % 50 == 0:
            made.cache.check()
        if len(made.requests) > 200:
            seen.update(what_happened(made))
            made.requests = [r for r in made.requests if r.finish is None]
    made.run()
    seen.update(what_happened(made))
    made.verify()
    return seen


def what_happened(made):
    for request in made.requests:
        if request.finish is not None:
            yield from (tier for tier, tokens in request.cached_by_tier.items() if tokens)
            yield from (f"{d.tier.name} {'loaded' if d.load else 'computed'}" for d in request.decisions)


def forget_some(made, tier):
    """As far as nobody uses it."""
    for kind in made.cache.kinds:
        shelf = made.cache.stats().shelves[kind.name, tier]
        made.cache.make_room(kind.name, shelf.free + shelf.evictable, tier)


EVERYTHING = {"device", "host", "storage", "STORAGE loaded", "STORAGE computed", "HOST loaded"}


def test_random_worlds_come_to_their_ends_with_the_right_tokens():
    seen = Counter()
    for seed in range(12):
        seen += walk(seed, 600)
    assert set(seen) >= EVERYTHING, seen


@pytest.mark.long
def test_a_million_steps_of_random_worlds():
    seen = Counter()
    for seed in range(100, 200):
        seen += walk(seed, 10_000)
    assert set(seen) >= EVERYTHING, seen
