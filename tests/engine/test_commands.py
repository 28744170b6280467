"""Commands are values: a log of them replays to the same state; and time is what the clock says."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import Callers, Time, expected_answer, hash_machine, real_machine, replay, state_of

import rootcellar
from rootcellar.cache import Answer, Key, Question, Reports, Tier
from rootcellar.engine import commands
from rootcellar.engine.commands import (
    Abandon,
    Abort,
    AbortAll,
    Continue,
    Expire,
    Flush,
    Pause,
    Pin,
    Release,
    Resume,
    Unpin,
)
from rootcellar.engine.step import Learn
from rootcellar.errors import ConfigError
from rootcellar.scheduler import Rates

PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=3)
IDS = st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple)
PINS = st.builds(Pin, IDS, st.just(""), st.just(""), st.floats(0, 50), st.just(1.0))
ACTIONS = st.one_of(
    st.tuples(PROMPTS, st.integers(0, 12), st.none() | st.floats(0, 50)),
    st.builds(Abandon, st.integers(0, 20)),
    st.builds(Abort, st.integers(0, 20).map(lambda i: f"c{i}"), st.none(), st.just("asked")),
    st.just(AbortAll("asked", "asked")),
    st.just(Flush()),
    st.builds(Pause, st.sampled_from(commands.PAUSES)),
    st.just(Continue()),
    st.builds(Release, st.just(("kv_cache",)), st.sampled_from(commands.MODES), st.booleans(), st.just(False)),
    st.just(Resume(("kv_cache",))),
    PINS,
    st.builds(Unpin, IDS, st.just(""), st.just("")),
    st.builds(Expire, st.floats(0, 50)),
    st.integers(1, 6),
)
COPIES = st.sampled_from([True, True, False])


def drive(callers, actions, first_call):
    """Let ``actions`` happen to a machine: commands, requests, and so many steps."""
    machine = callers.machine
    for i, action in enumerate(actions):
        match action:
            case bool():
                machine.copies.finish(ok=action)
                machine.learn()
            case int():
                for _ in range(action):
                    machine.learn()
                    if machine.ready:
                        machine.step()
            case (prompts, most, deadline):
                callers.do(callers.submit(prompts, first_call + i, deadline, max_new_tokens=most))
            case command:
                callers.do(command)


def settle(callers):
    """Everything ends that can, and the memory is there again."""
    callers.do(Continue())
    callers.do(Resume(("kv_cache",)))
    callers.run()


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS | COPIES, max_size=30), st.sampled_from([0, 256]), st.integers(1, 3))
def test_a_log_replays_to_the_same_state(actions, host, per_step):
    one, other = (Callers(hash_machine(host=host, per_step=per_step)) for _ in range(2))
    one.machine.log = log = []
    drive(one, actions, 0)
    replay(log, one.machine.turns, other)
    assert state_of(other.machine) == state_of(one.machine)
    assert other.results() == one.results()
    log.clear()
    settle(one)
    replay(log, one.machine.turns, other)
    assert state_of(other.machine) == state_of(one.machine)
    assert other.results() == one.results()
    for prompts, call in [(a[0], i) for i, a in enumerate(actions) if isinstance(a, tuple)]:
        for j, prompt in enumerate(prompts):
            answer, finish = one.results().get(f"c{call}-{j}", ([], None))
            assert answer == expected_answer(prompt, 12)[: len(answer)]
            assert not answer or finish is not None


@pytest.fixture(scope="module")
def twins(tiny_folder):
    """Two machines over one real model; all that happens to the first is replayed on the second."""
    options = {"max_total_tokens": 64, "page_size": 4, "max_running_requests": 4, "chunked_prefill_size": 8}
    one, other = (Callers(real_machine(tiny_folder, **options)) for _ in range(2))
    one.machine.log = []
    return one, other


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=5, max_size=20))
def test_a_real_models_log_replays_to_the_same_tokens(twins, actions):
    one, other = twins
    log, calls = one.machine.log, len(one.updates)
    log.clear()
    drive(one, actions, calls)
    settle(one)
    replay(log, one.machine.turns, other)
    assert state_of(other.machine) == state_of(one.machine)
    assert other.results() == one.results()


def test_commands_are_frozen_and_say_what_they_may_be():
    for name in vars(commands):
        found = vars(commands)[name]
        if isinstance(found, type) and issubclass(found, commands.Command):
            assert dataclasses.is_dataclass(found)
            assert found.__dataclass_params__.frozen
    with pytest.raises(ConfigError, match="choose from abort, retract, in_place"):
        Pause("softly")
    with pytest.raises(ConfigError, match="choose from wait, abort, retract"):
        Release((), "softly", False, False)


def test_a_command_that_waits_for_rest_is_answered_then():
    callers = Callers(hash_machine())
    callers.do(callers.submit([[1, 2, 3]], 0, max_new_tokens=4))
    callers.machine.step()
    reply = callers.do(Release(("kv_cache",), "wait", False, False))
    assert not reply.done()
    callers.run()
    assert reply.result()["buffers"] == 1
    assert callers.results()["c0-0"][0] == expected_answer([1, 2, 3], 4)


def test_a_large_call_that_was_given_up_ends_in_several_goes():
    callers = Callers(hash_machine())
    callers.do(callers.submit([[1, 2, 3]] * 70, 5, max_new_tokens=4))
    callers.machine.step()
    assert [callers.do(Abandon(5)).result() for _ in range(4)] == [True, True, False, False]
    assert not callers.machine.trackers
    assert callers.machine.scheduler.idle
    assert len(callers.results()) == 70


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_deadline_passes_when_the_clock_says_so(tiny_folder):
    time = Time()
    settings = {"temperature": 0, "max_new_tokens": 900, "ignore_eos": True}
    with rootcellar.Engine(
        model_path=tiny_folder, max_total_tokens=1024, request_timeout=3600, clock=time.clock
    ) as engine:
        stream = engine.generate(prompt="hello", sampling_params=settings, stream=True)
        assert next(stream)["meta_info"]["e2e_latency"] == 0
        time.now = 3600.0
        last = list(stream)[-1]
        assert last["meta_info"]["finish_reason"]["cause"] == "timeout"
        assert last["meta_info"]["e2e_latency"] == 3600


def test_a_pin_ends_when_the_clock_says_so(tiny_folder):
    time = Time()
    settings = {"temperature": 0, "max_new_tokens": 2}
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=512, clock=time.clock) as engine:
        ids = list(range(5, 45))
        engine.generate(input_ids=ids, sampling_params=settings)
        assert engine.prefixes.pin(ids, seconds=60)["pinned_tokens"] == 32
        for now, pinned in ((59.0, 32), (60.0, 0)):
            time.now = now
            assert engine.stats()["cache"]["full"]["DEVICE"]["pinned"] == pinned


@pytest.mark.parametrize(
    "wait", [lambda machine: machine.life.flush(), lambda machine: machine.recover(OSError())], ids=["flush", "recover"]
)
def test_what_a_store_says_while_copies_are_waited_for_is_learned_and_logged(wait):
    machine = Callers(hash_machine(host=256)).machine
    machine.log = []
    machine.copies.ask(3, Question(Key([1]), Tier.STORAGE, (), 4, 0, (), ()))
    wait(machine)
    machine.learn()
    assert machine.log == [(0, Learn(Reports((), (Answer(3, ()),)), Rates(), 0.0))]
