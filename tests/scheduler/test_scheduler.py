"""The scheduler over the real cache and a simulated model: tokens, fairness, memory, order."""

import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated import World, expected_answer

from rootcellar.cache import Done, Tier, chunked_local, sliding_window
from rootcellar.plan.sizing import request_pages
from rootcellar.scheduler import Finish, PrefetchRules, Rates, Stage, TierRate


def prompt(seed, length):
    return [(seed * 31 + i * (7 + seed)) % 50 for i in range(length)]


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("policy", ["lpm", "fcfs"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_answers_do_not_depend_on_the_cache(page_size, policy, reuse, states):
    world = World(tokens=128, page_size=page_size, policy=policy, reuse=reuse, states=states)
    for seed in (1, 2, 1, 1, 3):
        world.add(prompt(seed, 20 + seed), 12)
    world.run()
    world.verify()
    if reuse:
        assert all(r.cached in range(16, 21, page_size) for r in world.requests[2:4])
    else:
        assert all(r.cached == 0 for r in world.requests)


def test_prefill_is_cut_into_chunks_that_end_on_pages():
    world = World(tokens=128, page_size=4, chunk=10)
    world.add(prompt(1, 30), 1)
    spans = []
    while (plan := world.step()) is not None:
        spans += [(c.start, c.stop) for c in plan.chunks]
    assert spans == [(0, 8), (8, 16), (16, 24), (24, 30)]
    world.verify()


def test_the_tree_may_refer_to_a_requests_tokens_and_not_write_them():
    request = World().add(prompt(1, 30), 1)
    tokens = request.key(20).tokens
    assert np.shares_memory(tokens, request.ids)
    assert not tokens.flags.writeable
    assert request.ids.flags.writeable


def test_chunks_of_several_requests_share_a_step():
    world = World(tokens=128, page_size=4, chunk=16)
    for seed in (1, 2, 3):
        world.add(prompt(seed, 6), 2)
    first = world.step()
    assert [(c.start, c.stop) for c in first.chunks] == [(0, 6), (0, 6), (0, 4)]
    world.run()
    world.verify()


def test_a_prefix_that_is_being_computed_is_waited_for():
    world = World(tokens=512, page_size=4, chunk=16, running=4)
    for _ in range(4):
        world.add(prompt(5, 64), 2)
    world.run()
    world.verify()
    assert [r.cached for r in world.requests] == [0, 60, 60, 60]


def test_decoding_goes_on_while_a_long_prompt_is_computed():
    world = World(tokens=512, page_size=4, chunk=8)
    short = world.add(prompt(1, 3), 40)
    world.step()
    world.add(prompt(2, 100), 1)
    kinds = [world.step().decode for _ in range(10)]
    assert kinds == [False, True] * 5 or kinds == [True, False] * 5
    assert short.stage is Stage.DECODE_LOOP
    world.run()
    world.verify()


def test_without_memory_the_youngest_waits_again_and_the_answer_is_the_same():
    world = World(tokens=48, page_size=4, chunk=16, running=4)
    seeds = [s for s in range(100) if len(expected_answer(prompt(s, 9), 30)) == 30][:3]
    for seed in seeds:
        world.add(prompt(seed, 9), 30)
    world.run()
    world.verify()
    assert world.scheduler.retractions > 0
    assert world.requests[0].retractions == 0
    assert next(r.rid for r in world.finished) == "r0"


def test_who_decodes_goes_on_where_prefill_took_anothers_memory_and_found_too_little():
    """The prompt's next chunk costs its rival's youngest request its memory, then, being the youngest, its own."""
    world = World(tokens=63, page_size=1, chunk=8, reuse=False)
    first = world.add(prompt(1, 12), 50, tenant="a")
    world.step()
    large = world.add(prompt(2, 47), 1, tenant="b")
    small = world.add(prompt(3, 1), 20, tenant="a")
    while not (large.retractions and small.retractions):
        before = first.length
        plan = world.step()
    assert plan.decode
    assert plan.requests == [first]
    assert first.length == before + 1
    world.run()
    world.verify()


def calls_of_a_decode_step(requests):
    """Python functions that run while a step of so many requests is planned and its tokens are taken, at the least."""
    world = World(tokens=64 * requests, page_size=1, chunk=8 * requests, running=requests, reuse=False)
    scheduler = world.scheduler
    for i in range(requests):
        world.add(prompt(i, 8), 50)
    counts = []
    for _ in range(6):
        events = []
        sys.setprofile(lambda frame, event, arg, events=events: events.append(event))
        plan = scheduler.plan()
        scheduler.advance(plan, [[1]] * len(plan.chunks))
        sys.setprofile(None)
        if plan.decode:
            assert len(plan.chunks) == requests
            counts.append(events.count("call"))
    return min(counts)


def test_a_decode_step_runs_one_python_function_for_each_request():
    """Which adds its token. All else is done for the batch, or inline: 64 of them are most of what the host does."""
    few, many = calls_of_a_decode_step(4), calls_of_a_decode_step(64)
    assert many - few < 1.5 * 60


def test_lpm_starts_the_longest_cached_prefix_first_and_fcfs_the_oldest():
    order = {}
    for policy in ("lpm", "fcfs"):
        world = World(tokens=256, page_size=4, chunk=64, running=1, policy=policy)
        world.add(prompt(1, 40), 2)
        world.run()
        world.add(prompt(9, 40), 2)
        world.add(prompt(1, 44), 2)
        world.run()
        world.verify()
        order[policy] = [r.rid for r in world.finished]
    assert order == {"lpm": ["r0", "r2", "r1"], "fcfs": ["r0", "r1", "r2"]}


def test_priority_goes_before_the_policy():
    world = World(tokens=256, running=1)
    world.add(prompt(1, 8), 2)
    world.add(prompt(2, 8), 2, priority=3)
    world.run()
    assert [r.rid for r in world.finished] == ["r1", "r0"]


def test_namespaces_share_nothing():
    world = World(tokens=256)
    for namespace in ("a", "b", "a"):
        world.add(prompt(1, 40), 2, namespace=namespace)
    world.run()
    world.verify()
    assert [r.cached for r in world.requests] == [0, 0, 36]


def test_a_prompt_to_be_scored_is_computed_although_it_is_cached():
    world = World(tokens=256)
    world.add(prompt(1, 40), 2)
    world.run()
    scored = world.add(prompt(1, 40), 2, score_from=10)
    world.run()
    world.verify()
    assert scored.cached == 8  # the page that holds position 10 is computed again


def test_abort_waiting_and_running():
    world = World(tokens=256, running=1)
    first, second = world.add(prompt(1, 40), 5), world.add(prompt(2, 40), 5)
    world.step()
    for request in (second, first):
        world.scheduler.finish(request, Finish("abort"))
        assert request.stage is Stage.FINISHED
    assert world.scheduler.idle
    world.verify()


def test_a_request_that_finds_no_room_alone_ends_with_the_reason():
    """The cache is smaller than the request: the engine refuses such a request, and if it did not, nothing hangs."""
    world = World(tokens=32)
    request = world.add(prompt(1, 20), 8)
    other = world.cache.open(world.cache.match(request.key(0)))
    world.cache.grow(other, 20)  # held by somebody whom the scheduler does not know
    while request.finish is None:
        world.scheduler.plan()
        if not world.scheduler.failed and request.lease is not None:
            request.computed = request.lease.length
    assert world.scheduler.failed == [request]
    assert "max_total_tokens" in request.finish.message


def test_who_finds_no_room_beside_what_another_node_fetches_waits_for_it():
    world = World(tokens=48, chunk=16)
    first = world.add(prompt(1, 30), 1, gives=True)
    while first not in world.scheduler.giving:
        world.step()
    offered = world.cache.send(first.key(first.prompt_length))
    request = world.add(prompt(2, 40), 3)
    for _ in range(20):
        world.step()
        assert request.finish is None
    assert world.scheduler.awaits_bytes
    world.scheduler.learn([Done(offered.id)])
    world.scheduler.finish(first, Finish("length"))
    world.run()
    world.verify()
    assert request.output.tolist() == expected_answer(prompt(2, 40), 3)


def windowed(chunked, span):
    return chunked_local("chunk", (1,), span) if chunked else sliding_window("window", (1,), span)


def test_admission_counts_what_each_kind_will_hold():
    """Three requests of 100 tokens: 24 in each window at most, so that all of them run in 120 tokens of windows."""
    world = World(tokens=480, chunk=16, running=3, window=sliding_window("window", (1,), 9), window_tokens=120)
    for i in range(3):
        world.add(prompt(i, 90), 10)
    most = 0
    while world.step() is not None:
        most = max(most, len(world.scheduler.running))
    assert most == 3
    assert world.scheduler.retractions == 0
    world.verify()


class Machine(RuleBasedStateMachine):
    """Requests that share prefixes come, run, are aborted; memory is scarce."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]),
        chunk=st.integers(1, 20),
        running=st.integers(1, 5),
        tokens=st.integers(48, 120),
        policy=st.sampled_from(["lpm", "fcfs"]),
        reuse=st.booleans(),
        window=st.none() | st.builds(windowed, st.booleans(), st.integers(1, 30)),
        spare=st.integers(0, 40),
        states=st.one_of(st.just(0), st.integers(2, 12)),
        interval=st.integers(1, 24),
        least=st.integers(1, 8),
        host=st.sampled_from([0, 0, 64, 256]),
        storage=st.sampled_from([0, 256, 1024]),
        policy_of_prefetch=st.sampled_from(["best_effort", "wait_complete", "timeout"]),
        slow=st.booleans(),
        per_step=st.sampled_from([1, 1, 2, 4]),
        unguessed=st.integers(0, 3),
        overlap=st.booleans(),
    )
    def start(self, window, spare, per_step, policy_of_prefetch, slow, **options):
        if options["states"]:  # they have no bytes here
            options["host"] = 0
        options["per_step"] = per_step
        spare += per_step * options["page_size"]
        if window is not None:  # at least what the engine gives it: one request's pages
            size = options["page_size"]
            least = request_pages(window, size, options["tokens"], max(options["chunk"], size)) * size
            options |= {"window": window, "window_tokens": least + spare}
        options["storage"] *= bool(options["host"])
        options["prefetch"] = PrefetchRules(policy_of_prefetch, 4, lambda tokens: 3.0)
        if slow:  # what the store has is computed sooner; the host's is loaded
            options["rates"] = Rates(1.0, TierRate(1e6), TierRate(1e-3))
        self.world = World(**options)

    @rule(
        seed=st.integers(0, 2),
        shared=st.integers(0, 20),
        own=st.integers(1, 10),
        tail=st.integers(0, 3),
        most=st.integers(0, 14),
        namespace=st.sampled_from(["", "", "x"]),
        priority=st.sampled_from([0, 0, 0, 1]),
        tenant=st.sampled_from(["", "", "x", "y"]),
        call=st.integers(0, 3),
        score_from=st.one_of(st.none(), st.none(), st.integers(0, 5)),
    )
    def add(self, seed, shared, own, tail, most, **options):
        self.world.add(prompt(seed, shared) + prompt(40 + tail, own), most, **options)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def abort(self, data):
        alive = [r for r in self.world.requests if r.finish is None]
        if alive:
            self.world.abort(data.draw(st.sampled_from(alive)))

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            if self.world.step() is None:
                assert self.world.scheduler.idle or self.world.scheduler.awaits_bytes
            self.world.cache.check()

    @precondition(lambda self: self.world.copies.pending)
    @rule(ok=st.sampled_from([True, True, False]))
    def copy(self, ok):
        self.world.copies.finish(ok=ok)

    @precondition(lambda self: self.world.copies.questions)
    @rule(ok=st.sampled_from([True, True, False]))
    def answer(self, ok):
        self.world.copies.answer(ok=ok)

    @precondition(lambda self: self.world.copies.stored)
    @rule(data=st.data())
    def lose(self, data):
        """The store drops a page, and tells nobody."""
        stored = self.world.copies.stored
        del stored[data.draw(st.sampled_from(sorted(stored)))]

    @precondition(lambda self: self.world.host and not self.world.copies.pending)
    @rule()
    def forget_near(self):
        """What is on the host alone leaves it."""
        cache = self.world.cache
        for kind in cache.kinds:
            cache.make_room(kind.name, cache.stats().shelves[kind.name, Tier.HOST].size, Tier.HOST)

    def teardown(self):
        if hasattr(self, "world"):
            self.world.run()
            self.world.verify()


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_every_prompt_token_is_computed_once_when_nothing_is_shared(lengths, chunk):
    world = World(tokens=400, chunk=chunk, running=6)
    for i, n in enumerate(lengths):
        world.add([i, *prompt(i, n - 1)], 1)
    total = 0
    while (plan := world.step()) is not None:
        total += sum(c.stop - c.start for c in plan.chunks)
    assert total == sum(lengths)
    world.verify()
