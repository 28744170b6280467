"""What the explainer concludes of requests that overlap, or end before their time: nothing that was not so."""

import numpy as np
import pytest
from machines import VOCAB, Callers, Time, hash_machine

from rootcellar.engine.commands import AbortAll, Flush
from rootcellar.misses import Cause, Earlier, Past, PrefillCost


def prompt(length):
    return np.random.default_rng(0).integers(0, VOCAB, length).tolist()


def cause_of(machine, name):
    return machine.recorder.explainer.find(name, None).cause


def test_a_prompt_of_one_token_has_its_time_where_only_pairs_seem_to_cost_any(monkeypatch):
    machine = hash_machine(tokens=128, chunk=32)
    machine.recorder.spending.cost = PrefillCost(pair=1e-6)
    monkeypatch.setattr(machine.recorder.spending, "_learn", lambda chunks: None)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1), prompt(1)], 0, max_new_tokens=2))
    callers.run()
    assert machine.generated == 4


def test_who_asks_the_same_at_the_same_time_lost_nothing():
    machine = hash_machine(tokens=128, chunk=32)
    callers = Callers(machine)
    for call in range(2):
        callers.do(callers.submit([prompt(12)], call, max_new_tokens=2))
    callers.run()
    assert [cause_of(machine, f"c{call}") for call in range(2)] == [Cause.FIRST_SEEN] * 2
    callers.do(callers.submit([prompt(12)], 2, max_new_tokens=2))
    callers.run()
    assert cause_of(machine, "c2") is not Cause.EVICTED


def test_what_was_given_up_before_it_was_computed_is_not_evicted():
    machine = hash_machine(tokens=256, chunk=16)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(100)], 0, max_new_tokens=2))
    callers.step()
    callers.do(AbortAll("enough", "asked"))
    callers.run()
    callers.do(callers.submit([prompt(100)], 1, max_new_tokens=2))
    callers.run()
    assert cause_of(machine, "c1") in (Cause.FIRST_SEEN, Cause.NOTHING)
    assert machine.recorder.explainer.report(None, 0.0, 10)[2] == 0


def test_a_prompt_that_cannot_be_judged_does_not_end_the_judging(monkeypatch):
    machine = hash_machine(tokens=128)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(12)], 0, max_new_tokens=2))
    callers.run()
    explainer = machine.recorder.explainer
    explainer._judging = True
    monkeypatch.setattr("rootcellar.engine.explaining.judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explainer.find("c0", None)
    assert not explainer._judging


def test_an_evicted_turn_costs_its_answer_too():
    machine = hash_machine(tokens=64, page_size=4)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(12)], 0, max_new_tokens=9, ignore_eos=True, stop_ids=()))
    callers.run()
    answer, _ = callers.results()["c0-0"]
    others = np.random.default_rng(1).integers(0, VOCAB, 60).tolist()
    callers.do(callers.submit([others], 1, max_new_tokens=2, stop_ids=()))
    callers.run()
    callers.do(callers.submit([[*prompt(12), *answer, 1, 2, 3]], 2, max_new_tokens=2, stop_ids=()))
    callers.run()
    miss = machine.recorder.explainer.find("c2", None)
    assert (miss.cause, miss.cached_tokens + miss.tokens) == (Cause.EVICTED, 20), "whole pages of 12 + 9 - 1 tokens"


def test_a_prompt_is_remembered_once_with_its_answer():
    past = Past()
    tokens = np.arange(40)
    for rid, n in (("a", 20), ("b", 20), ("a", 30), ("b", 20), ("b", 25)):
        past.add("t", Earlier(rid, tokens[:n], "", 0))
    past.add("t", Earlier("a", tokens[::-1], "", 0))  # somebody uses a name again
    assert [(each.rid, len(each.tokens)) for each in past.of("t")] == [("a", 40), ("b", 25), ("a", 30)]


def test_a_report_of_more_than_is_remembered_says_of_how_long_it_is(monkeypatch):
    monkeypatch.setattr("rootcellar.engine.explaining._KEPT", 2)
    machine = hash_machine(tokens=128)
    callers = Callers(machine)
    seconds = []
    for call in range(3):
        callers.do(callers.submit([prompt(12)], call, max_new_tokens=2))
        callers.run()
        seconds.append(machine.recorder.explainer.report(None, machine.clock.now(), 10)[:2])
    assert seconds[0] == (3600.0, 1)
    assert seconds[2][0] < 3600
    assert seconds[2][1] == 2


def test_the_price_is_what_computing_it_again_took():
    """Where a step, a token, and an earlier token that it attends to take their time each."""
    time = Time()
    machine = hash_machine(tokens=1024, chunk=64, time=time)
    callers, rng, step = Callers(machine), np.random.default_rng(0), machine.runner.step

    def slow(batch, before=None):
        there = batch.positions[batch.positions >= 0]
        time.now += 0.5 + 0.01 * len(batch.positions) + 1e-4 * int(there.sum())
        return step(batch, before)

    def ask(*prompts):
        began = time.now
        for ids in prompts:
            calls.append(callers.submit([ids], len(calls), max_new_tokens=1))
            callers.do(calls[-1])
        callers.run()
        return time.now - began

    def some(length):
        return rng.integers(0, VOCAB, length).tolist()

    calls, machine.runner.step = [], slow
    for length in (10, 400, 50, 200, 150, 30, 300, 90):
        ask(some(length))
    for length, tail in ((40, 10), (100, 20), (400, 40), (200, 200)):
        kept = some(length)
        ask(kept)
        hit = ask(kept + some(tail))
        callers.do(Flush())
        miss = ask(kept + some(tail))
        found = machine.recorder.explainer.find(f"c{len(calls) - 1}", None)
        assert found.tokens == length
        assert found.seconds == pytest.approx(miss - hit, rel=0.01)
    several = [some(length) for length in (100, 300, 40)]
    ask(*several)
    callers.do(Flush())
    misses = ask(*several)
    found = [machine.recorder.explainer.find(f"c{len(calls) - i}", None) for i in (1, 2, 3)]
    ends = ask(*several)
    assert sum(each.seconds for each in found) == pytest.approx(misses - ends, rel=0.1)
