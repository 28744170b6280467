"""What the explainer concludes of requests that overlap, or end before their time: nothing that was not so."""

import numpy as np
import pytest
from machines import VOCAB, Callers, hash_machine

from rootcellar.engine.commands import AbortAll
from rootcellar.misses import Cause


def prompt(length):
    return np.random.default_rng(0).integers(0, VOCAB, length).tolist()


def cause_of(machine, name):
    return machine.recorder.explainer.find(name, None).cause


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
    assert machine.recorder.explainer.report(None, 0.0, 10)[1] == 0


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
