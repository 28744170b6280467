"""The next step is computed while what the one before gave is taken: the same results, over hashes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import EOS, VOCAB, Callers, Time, expected_answer, hash_machine

from rootcellar.config import EngineConfig
from rootcellar.engine.build import build
from rootcellar.engine.commands import Abort, Continue, Pause, Release, Resume
from rootcellar.engine.output import LogprobOptions
from rootcellar.text import Tokenizer


def prompt(seed, length):
    return [(seed * 31 + i * (7 + seed)) % VOCAB for i in range(length)]


def talkative(most, length=8):
    """Prompts, endlessly, whose answers have no stop token among their first ``most``."""
    return (p for p in (prompt(seed, length) for seed in range(1000)) if EOS not in expected_answer(p, most))


def whole(machine):
    """Nothing runs, waits, is held or under way."""
    machine.scheduler.cache.check()
    assert machine.scheduler.idle
    assert not machine.ready
    assert not machine.trackers
    for shelf in machine.scheduler.cache.stats().shelves.values():
        assert shelf.pinned == shelf.leased == 0


def results(callers):
    """All that callers see of their answers, but times."""
    found = {}
    for rid, updates in callers.updates.items():
        last = updates[-1].render()
        meta = last["meta_info"]
        kept = ("finish_reason", "cached_tokens", "cached_tokens_details", "completion_tokens", "output_token_logprobs")
        found[rid] = {
            "tokens": last["output_ids"],
            "text": last.get("text"),
            "stages": [name for name, _ in meta["stages"]],
            "versions": meta["weight_versions"],
            "updates": [len(u.render()["output_ids"]) for u in updates],
            **{key: meta.get(key) for key in kept},
        }
    return found


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return Tokenizer(tiny_folder)


# -- it happens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_the_next_step_is_begun_before_the_tokens_of_this_one_are_read(overlap):
    machine = hash_machine(tokens=128, overlap=overlap)
    callers = Callers(machine)
    callers.do(callers.submit([next(talkative(5))], 0, max_new_tokens=5))
    callers.run()
    begun_first = ["step", "step", "read", "step", "read", "step", "read", "step", "read", "read"]
    assert machine.runner.notes == (begun_first if overlap else ["step", "read"] * 5)
    assert machine.steps == 5
    whole(machine)


@pytest.mark.parametrize(
    "sampling", [{"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}, "grammar"]
)
def test_what_needs_the_token_before_waits_for_it(sampling):
    class Any:
        def allowed(self):
            return None

        def take(self, token):
            return None

    machine = hash_machine(tokens=128)
    callers = Callers(machine, grammar=lambda rid: Any() if sampling == "grammar" else None)
    callers.do(callers.submit([prompt(1, 8)], 0, max_new_tokens=4, **({} if sampling == "grammar" else sampling)))
    callers.run()
    assert machine.runner.notes == ["step", "read"] * machine.steps


# -- nothing else differs ---------------------------------------------------------------------------------------------

ASKED = st.lists(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 3),
            "length": st.integers(1, 24),
            "max_new_tokens": st.integers(0, 20),
            "min_new_tokens": st.integers(0, 4),
            "stop": st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789"), max_size=2).map(tuple),
            "logprobs": st.sampled_from([None, LogprobOptions(texts=False), LogprobOptions(top=1, texts=False)]),
            "penalty": st.sampled_from([0, 0, 0, 0.5]),
            "after": st.integers(0, 6),
        }
    ),
    min_size=1,
    max_size=5,
)
ABORTS = st.dictionaries(st.integers(0, 4), st.integers(1, 12), max_size=2)


def commands_of(asked, aborts, callers):
    """Commands, each with the steps to be run before."""
    made = []
    for i, each in enumerate(asked):
        least = min(each["min_new_tokens"], each["max_new_tokens"])
        sampling = {"max_new_tokens": each["max_new_tokens"], "min_new_tokens": least, "stop": each["stop"]}
        sampling["presence_penalty"] = each["penalty"]
        submit = callers.submit([prompt(each["seed"], each["length"])], i, logprobs=each["logprobs"], **sampling)
        made.append((each["after"], submit))
        if i in aborts:
            made.append((aborts[i], Abort(f"c{i}", None, "asked")))
    return made


def drive(callers, commands, *, follow):
    """Carry out commands, with turns in between.

    ``follow``: the steps after which each was carried out on another machine; without it so many turns are made.
    Returns these numbers of steps.
    """
    machine, at = callers.machine, []
    for i, (turns, command) in enumerate(commands):
        for _ in range(turns if follow is None else 10**6):
            if not machine.ready or (follow is not None and machine.steps == follow[i]):
                break
            callers.step()
        callers.do(command)
        at.append(machine.steps)
    callers.run()
    return at


def twice(tokenizer, asked, aborts, **options):
    """Two machines and what they answered: the second takes what a step gave before it plans the next."""
    steps, found = None, []
    for overlap in (True, False):
        machine = hash_machine(overlap=overlap, **options)
        callers = Callers(machine, tokenizer)
        steps = drive(callers, commands_of(asked, aborts, callers), follow=steps)
        whole(machine)
        found.append((machine, results(callers)))
    return found


@settings(max_examples=60, deadline=None)
@given(ASKED, ABORTS, st.sampled_from([1, 4, 16]), st.sampled_from([4, 16]))
def test_with_room_for_all_nothing_differs(tokenizer, asked, aborts, page_size, chunk):
    """Whatever ends an answer, and whenever commands come: what callers see, and what the cache has in the end."""
    options = {"tokens": 400, "page_size": page_size, "chunk": chunk, "running": 5}
    (one, first), (other, second) = twice(tokenizer, asked, aborts, **options)
    assert first == second
    assert (one.steps, one.generated, one.prompted) == (other.steps, other.generated, other.prompted)
    assert one.scheduler.cache.tree(10_000) == other.scheduler.cache.tree(10_000)
    assert one.scheduler.cache.stats() == other.scheduler.cache.stats()


@settings(max_examples=50, deadline=None)
@given(ASKED, ABORTS, st.sampled_from([1, 4, 16]), st.sampled_from([0, 256]), st.integers(1, 4))
def test_under_little_memory_and_with_few_rows_the_answers_are_the_same(
    tokenizer, asked, aborts, page_size, host, running
):
    """Who was aborted aside: how far that came is a matter of whose turn it was."""
    options = {"tokens": 64, "page_size": page_size, "host": host, "running": running}
    (_, first), (_, second) = twice(tokenizer, asked, aborts, **options)
    for i in range(len(asked)):
        one, other = first[f"c{i}-0"], second[f"c{i}-0"]
        if i not in aborts:
            kept = ("tokens", "text", "finish_reason", "output_token_logprobs")
            assert [one[key] for key in kept] == [other[key] for key in kept]


# -- commands ---------------------------------------------------------------------------------------------------------


def test_a_command_finds_what_is_under_way_taken():
    machine = hash_machine(tokens=128)
    callers = Callers(machine)
    callers.do(callers.submit([next(talkative(20))], 0, max_new_tokens=20))
    (tracker,) = machine.roster.of(None)
    callers.step()
    callers.step()
    assert (tracker.request.generated, machine.runner.notes.count("step")) == (2, 3)
    callers.do(Pause("in_place"))
    assert tracker.request.generated == 3
    assert not machine.ready
    callers.do(Continue())
    callers.run()
    assert callers.results()["c0-0"][0] == expected_answer(prompt_of(tracker), 20)
    whole(machine)


def prompt_of(tracker):
    return tracker.request.ids[: tracker.request.prompt_length].tolist()


def test_memory_is_released_when_the_last_answer_ended_and_its_superfluous_step_was_taken():
    """An answer ends unexpectedly: what waits for rest finds nothing under way."""
    asked = next(p for p in (prompt(s, 8) for s in range(200)) if 3 < len(expected_answer(p, 20)) < 12)
    machine = hash_machine(tokens=128)
    callers = Callers(machine)
    callers.do(callers.submit([asked], 0, max_new_tokens=20))
    callers.step()
    reply = callers.do(Release(("kv_cache",), "wait", False, False))
    while not reply.done():
        callers.step()
    assert reply.result()["buffers"] == 1
    assert machine.runner.notes.count("step") == machine.runner.notes.count("read") == machine.steps + 1
    assert not machine.ready
    callers.do(Resume(("kv_cache",)))
    callers.do(callers.submit([asked], 1, max_new_tokens=20))
    callers.run()
    answers = {rid: tokens for rid, (tokens, _) in callers.results().items()}
    assert answers == {"c0-0": expected_answer(asked, 20), "c1-0": expected_answer(asked, 20)}
    whole(machine)


# -- a device that is never short of work ------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_at_64_rows_the_device_has_its_next_step_before_it_is_asked_for_this_ones_tokens(overlap):
    """Counted in steps, not in seconds: those at whose end nothing waits to be computed. Answers end apart."""
    machine = hash_machine(tokens=64 * 64, running=64, chunk=512, overlap=overlap)
    callers = Callers(machine)
    asked = list(itertools.islice(talkative(40), 64))
    for i, each in enumerate(asked):
        callers.do(callers.submit([each], i, max_new_tokens=20 + i % 20))
    callers.run()
    notes = machine.runner.notes
    decoding = next((i for i, pair in enumerate(itertools.pairwise(notes)) if pair == ("step", "step")), 0)
    ahead = np.cumsum([1 if note == "step" else -1 for note in notes])
    reads = [left for left, note in zip(ahead[decoding:], notes[decoding:], strict=True) if note == "read"]
    dry = sum(left == 0 for left in reads)
    assert len(reads) >= 36
    assert dry == (1 if overlap else len(reads)), "only after the last there is nothing to do"
    whole(machine)


# -- steps that fail --------------------------------------------------------------------------------------------------


def test_a_step_that_cannot_be_begun_takes_nothing_from_the_one_before():
    """The tokens of the step under way are delivered; the requests of the one that broke end after them."""
    machine = hash_machine(tokens=128)
    callers = Callers(machine)
    asked = next(talkative(12))
    callers.do(callers.submit([asked], 0, max_new_tokens=12))
    machine.runner.fails = [False, False, True]
    callers.step()
    callers.step()
    tokens, reason = callers.results()["c0-0"]
    assert tokens == expected_answer(asked, 2)
    assert "the device is on fire" in reason["message"]
    whole(machine)


@pytest.mark.parametrize("by_command", [False, True])
def test_a_failure_that_is_found_late_is_that_steps_alone(by_command):
    """Its requests end, though the next step runs already, and who waits goes on. A command has no part in it."""
    machine = hash_machine(tokens=128, running=1)
    callers = Callers(machine)
    asked = list(itertools.islice(talkative(12), 2))
    callers.do(callers.submit(asked, 0, max_new_tokens=12))
    machine.runner.fails_late = [False, False, True]
    callers.step()
    callers.step()
    if by_command:
        reply = callers.do(Pause("in_place"))
        assert (reply.result(), machine.paused) == (None, True)
        assert machine.runner.notes[-1] == "read"
        callers.do(Continue())
    else:
        callers.step()
        assert machine.runner.notes[-2:] == ["step", "read"]
    assert machine._launched is None
    assert callers.results().keys() == {"c0-0"}
    tokens, reason = callers.results()["c0-0"]
    assert (tokens, reason["cause"]) == (expected_answer(asked[0], 2), "failed")
    callers.run()
    assert callers.results()["c0-1"][0] == expected_answer(asked[1], 12)
    whole(machine)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(0, 12)), min_size=1, max_size=6),
    st.lists(st.booleans(), max_size=12),
    st.lists(st.booleans(), max_size=12),
    st.sampled_from([0, 256]),
)
def test_whatever_fails_and_whenever_that_is_found_the_others_get_their_answers(asked, fails, late, host):
    machine = hash_machine(tokens=96, host=host)
    callers = Callers(machine)
    machine.runner.fails, machine.runner.fails_late = list(fails), list(late)
    for i, (seed, length, most) in enumerate(asked):
        callers.do(callers.submit([prompt(seed, length)], i, max_new_tokens=most))
        if i % 2:
            callers.step()
    callers.run()
    for i, (seed, length, most) in enumerate(asked):
        answer, reason = callers.results()[f"c{i}-0"]
        expected = expected_answer(prompt(seed, length), most)
        assert answer == expected[: len(answer)]
        assert reason["type"] == "abort" or answer == expected
    whole(machine)


# -- times ------------------------------------------------------------------------------------------------------------


def test_steps_that_overlap_count_no_second_twice():
    """A clock that runs a second at each look: steps lie end to end, and so do the device's parts."""
    time = Time()

    def now():
        time.now += 1.0
        return time.now

    time.clock = type(time.clock)(now)
    machine = hash_machine(tokens=128, time=time)
    callers = Callers(machine)
    callers.do(callers.submit([next(talkative(6))], 0, max_new_tokens=6))
    callers.run()
    steps = list(machine.recorder.timeline.steps)
    assert len(steps) == 6
    for one, then in itertools.pairwise(steps):
        assert then.began == one.ended
        assert then.dispatched == one.computed
        assert one.began < one.computed < one.ended
    outside = machine.recorder.metrics.outside_seconds
    first, last = steps[0], steps[-1]
    assert outside["prefill"] == first.dispatched - first.began
    assert outside["decode"] == last.ended - last.computed, "the device had the next step while the host was busy"


def test_logprobs_of_the_likeliest_are_read_with_their_step():
    machine = hash_machine(tokens=128)
    callers = Callers(machine)
    asked = next(talkative(6))
    callers.do(callers.submit([asked], 0, logprobs=LogprobOptions(top=1, texts=False), max_new_tokens=6))
    callers.run()
    meta = callers.updates["c0-0"][-1].render()["meta_info"]
    assert [top[0][1] for top in meta["output_top_logprobs"]] == expected_answer(asked, 6)
    logprobs = [p for p, _, _ in meta["output_token_logprobs"]]
    np.testing.assert_allclose(logprobs, -np.array(expected_answer(asked, 6)) / VOCAB)


@pytest.mark.parametrize(
    ("settings", "overlap"),
    [({}, True), ({"disable_overlap_schedule": True}, False), ({"speculative_algorithm": "ngram"}, True)],
)
def test_steps_overlap_unless_it_was_switched_off(settings, overlap):
    parts = build(EngineConfig.from_kwargs(model_path="demo", max_total_tokens=512, **settings))
    assert parts.overlap == overlap
