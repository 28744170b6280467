"""Steps that fail, wait for bytes, or give several tokens; over hashes for keys and values."""

import queue
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import EOS, VOCAB, Callers, expected_answer, hash_machine

from rootcellar.cache import Done, Key, Reports, Tier
from rootcellar.engine.commands import Hint, Pin
from rootcellar.engine.loop import Loop
from rootcellar.engine.output import LogprobOptions
from rootcellar.errors import CacheBroken
from rootcellar.scheduler import Finish, Stage
from rootcellar.text import Tokenizer


def prompt(seed, length):
    return [(seed * 31 + i * (7 + seed)) % VOCAB for i in range(length)]


def check_whole(machine):
    """Nothing runs, waits or is held, and all that is not free is cached."""
    cache = machine.scheduler.cache
    cache.check()
    assert machine.scheduler.idle
    assert not machine.trackers
    for shelf in cache.stats().shelves.values():
        assert shelf.pinned == shelf.leased == 0
        assert shelf.free + shelf.cached + shelf.in_flight == shelf.size


def test_what_is_only_retained_gives_way_to_a_request_that_grows():
    machine = hash_machine(tokens=64)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 28)], 0, max_new_tokens=1))
    callers.run()
    kept = callers.do(Hint(tuple(prompt(1, 28)), "", "", {"retain": 60.0}, 1.0, 0.0)).result()
    assert kept[0].tokens == 28
    callers.do(callers.submit([prompt(2, 20)], 1, stop_ids=(), max_new_tokens=40))
    callers.run()
    assert callers.results()["c1-0"][1] == {"type": "length", "length": 40}
    check_whole(machine)


def kept_and_asked(sort, length, new):
    """What becomes of a request beside a prompt of 28 tokens that is kept so, in a cache of 64."""
    machine = hash_machine(tokens=64)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 28)], 0, max_new_tokens=1))
    callers.run()
    tokens, _ = callers.do(Pin(tuple(prompt(1, 28)), "", "", 60.0, 1.0, sort)).result()
    assert tokens == 28
    callers.do(callers.submit([prompt(2, length)], 1, stop_ids=(), max_new_tokens=new))
    callers.run()
    reason = callers.results()["c1-0"][1]
    machine.pins.expire(60.0)
    check_whole(machine)
    return reason


@pytest.mark.parametrize(("length", "new"), [(50, 1), (20, 40)], ids=["its prompt", "its answer"])
def test_a_conversation_that_is_kept_makes_way_where_nobody_else_can(length, new):
    assert kept_and_asked("kept", length, new) == {"type": "length", "length": new}
    reason = kept_and_asked("pin", length, new)
    assert reason["type"] == "abort"
    assert re.search("no room for request .* unpin", reason["message"])


def test_conversations_make_way_for_who_cannot_even_start(monkeypatch):
    """As where they hold all recurrent states."""
    machine = hash_machine(tokens=64)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 12), prompt(2, 12)], 0, max_new_tokens=1))
    callers.run()
    for seed in (1, 2):
        callers.do(Pin(tuple(prompt(seed, 12)), "", "", 60.0, 1.0, "kept")).result()
    real = machine.scheduler.cache.open
    monkeypatch.setattr(
        machine.scheduler.cache,
        "open",
        lambda *hit, **how: real(*hit, **how) if machine.pins.next_end is None else None,
    )
    callers.do(callers.submit([prompt(3, 8)], 1, stop_ids=(), max_new_tokens=2))
    callers.run()
    assert callers.results()["c1-0"][1] == {"type": "length", "length": 2}
    check_whole(machine)


# -- steps that fail --------------------------------------------------------------------------------------------------


class Waited(np.ndarray):
    """Scores that note when somebody has waited for them."""

    def block_until_ready(self):
        self.note()
        return self


def test_steps_of_a_long_prompt_do_not_pile_up_on_the_device(monkeypatch):
    """Whoever comes would wait for all of them."""
    machine = hash_machine(tokens=128, chunk=8)
    step, under_way, most = machine.runner.step, [], []

    def observed(batch, before=None):
        scores, hidden = step(batch, before)
        scores = scores.view(Waited)
        scores.note = under_way.pop
        under_way.append(0)
        most.append(len(under_way))
        return scores, hidden

    monkeypatch.setattr(machine.runner, "step", observed)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 60)], 0, max_new_tokens=2))
    callers.run()
    assert most[:8] == [1] * 8
    check_whole(machine)


@pytest.mark.parametrize("host", [0, 256])
def test_a_failed_step_ends_its_own_requests_alone(host):
    """One decodes, one is prefilled when the step breaks, one waits: only the second ends."""
    machine = hash_machine(tokens=128, chunk=8, running=2, host=host)
    callers = Callers(machine)
    prompts = {"decodes": prompt(1, 6), "prefills": prompt(2, 40), "waits": prompt(3, 9)}
    callers.do(callers.submit([prompts["decodes"]], 0, max_new_tokens=12))
    callers.step()
    callers.do(callers.submit([prompts["prefills"]], 1, max_new_tokens=12))
    callers.do(callers.submit([prompts["waits"]], 2, max_new_tokens=12))
    decodes, prefills, waits = (t.request for t in machine.roster.of(None))
    while prefills.stage is not Stage.PREFILL_CHUNKED_FORWARD:
        callers.step()
    while machine.scheduler._decode_next:
        callers.step()
    machine.runner.fails = [True]
    callers.step()
    assert (decodes.stage, prefills.stage, waits.stage) == (
        Stage.PREFILL_WAITING, Stage.FINISHED, Stage.PREFILL_WAITING
    )  # fmt: skip
    assert decodes.retractions == 1
    callers.run()
    results = callers.results()
    assert results["c0-0"][0] == expected_answer(prompts["decodes"], 12)
    assert results["c2-0"][0] == expected_answer(prompts["waits"], 12)
    assert results["c1-0"][1]["cause"] == "failed"
    assert "the device is on fire" in results["c1-0"][1]["message"]
    check_whole(machine)


def test_a_failed_step_forgets_the_device_and_what_lies_on_the_host_is_loaded():
    machine = hash_machine(tokens=128, host=256)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 21)], 0, max_new_tokens=1))
    callers.run()
    machine.copies.finish()
    machine.learn()
    callers.do(callers.submit([prompt(2, 9)], 1, max_new_tokens=4))
    machine.runner.fails = [True]
    callers.step()
    assert callers.results()["c1-0"][1]["cause"] == "failed"
    hit = machine.scheduler.cache.match(machine.scheduler.key(prompt(1, 21), ""))
    assert (hit.length, hit.reach(Tier.HOST)) == (0, 20)
    callers.do(callers.submit([prompt(1, 21)], 2, max_new_tokens=6))
    (tracker,) = machine.roster.of(None)
    callers.run()
    assert tracker.request.cached_by_tier["host"] == 20
    assert callers.results()["c2-0"][0] == expected_answer(prompt(1, 21), 6)
    check_whole(machine)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(0, 12)), min_size=1, max_size=8),
    st.lists(st.booleans(), max_size=12),
    st.sampled_from([0, 64, 256]),
    st.integers(1, 4),
)
def test_whatever_fails_the_others_get_their_answers(asked, fails, host, per_step):
    machine = hash_machine(tokens=96, host=host, per_step=per_step)
    callers = Callers(machine)
    machine.runner.fails = list(fails)
    for i, (seed, length, most) in enumerate(asked):
        callers.do(callers.submit([prompt(seed, length)], i, max_new_tokens=most))
        callers.step()
    callers.run()
    for i, (seed, length, most) in enumerate(asked):
        answer, reason = callers.results()[f"c{i}-0"]
        if reason["type"] == "abort":
            assert reason["cause"] == "failed"
            assert any(fails)
        else:
            assert answer == expected_answer(prompt(seed, length), most)
    check_whole(machine)


def test_a_failure_that_is_no_steps_ends_all():
    machine = hash_machine()
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 9), prompt(2, 9)], 0, max_new_tokens=4))
    machine.step()
    machine.recover(RuntimeError("out of the blue"))
    assert {reason["cause"] for _, reason in callers.results().values()} == {"failed"}
    check_whole(machine)


def test_a_report_that_cannot_be_learned_is_told(monkeypatch):
    """Otherwise whoever waits for its bytes would wait for ever, and nobody would know why."""

    def learn(events):
        raise CacheBroken(f"{len(events)} reports make no sense")

    machine = hash_machine(host=256)
    machine.copies.reports = lambda: Reports((Done(99),))
    monkeypatch.setattr(machine.scheduler, "learn", learn)
    with pytest.raises(CacheBroken, match="1 reports"):
        machine.learn()


def test_experts_that_cannot_be_read_leave_nothing_undone():
    class Unreadable:
        def note(self, *_):
            pass

        def read(self, *_):
            raise MemoryError("no room for the experts")

    machine = hash_machine()
    machine.life.routing, told = Unreadable(), []
    for what in (machine.prefetcher, machine.peers):
        what.ended = told.append
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 9), prompt(2, 9)], 0, max_new_tokens=4))
    callers.run()
    assert len(told) == 4
    for _, reason in callers.results().values():
        assert "no room for the experts" in reason["message"]
    check_whole(machine)


def test_a_request_whose_end_cannot_be_kept_is_answered_with_the_reason():
    class Broken:
        next_end = None

        def arrived(self, request, now):
            pass

        def questions(self):
            return []

        def ended(self, request):
            raise CacheBroken("nothing can be written down")

    callers = Callers(hash_machine(prefetcher=Broken()))
    callers.do(callers.submit([prompt(1, 9), prompt(2, 9)], 0, max_new_tokens=4))
    callers.run()
    for _, reason in callers.results().values():
        assert "nothing can be written down" in reason["message"]
    check_whole(callers.machine)


# -- bytes that are on their way --------------------------------------------------------------------------------------


def on_the_host(machine, callers):
    """Let what ``prompt(1, 21)`` leaves lie on HOST alone."""
    callers.do(callers.submit([prompt(1, 21)], 100, max_new_tokens=1))
    callers.run()
    while machine.copies.finish():
        machine.learn()
    assert machine.scheduler.cache.make_room("full", 64)


def test_the_machine_rests_until_the_bytes_are_there():
    machine = hash_machine(host=256)
    callers = Callers(machine)
    on_the_host(machine, callers)
    callers.do(callers.submit([prompt(1, 21)], 0, max_new_tokens=4))
    machine.step()
    (tracker,) = machine.roster.of(None)
    assert tracker.stages[-1][0] == "LOADING"
    assert not machine.ready
    callers.do(callers.submit([prompt(2, 5)], 1, max_new_tokens=4))
    assert machine.ready, "there is news: others may be computed"
    while machine.ready:
        machine.step()
    assert callers.results()["c1-0"][0] == expected_answer(prompt(2, 5), 4)
    assert machine.trackers[tracker.request] is tracker, "it is neither ended nor computed"
    machine.copies.finish(dst=Tier.DEVICE)
    machine.learn()
    assert machine.ready
    callers.run()
    assert callers.results()["c0-0"][0] == expected_answer(prompt(1, 21), 4)
    check_whole(machine)


def test_a_picture_has_the_next_turn_though_others_wait_for_bytes():
    """They take turns with steps: in a step's, where nothing can be computed, a picture may be what is waited for."""

    class Encoder:
        left = 3

        def turn(self, end):
            self.left -= 1
            return self.left >= 0

    machine = hash_machine(host=256)
    callers = Callers(machine)
    on_the_host(machine, callers)
    callers.do(callers.submit([prompt(1, 21)], 0, max_new_tokens=4))
    machine.life.encodings = Encoder()
    turns = 0
    while machine.ready and turns < 20:
        machine.step()
        turns += 1
    assert machine.life.encodings.left < 0, "all of the picture is encoded"
    assert turns < 20, "then it rests until the bytes are there"
    machine.copies.finish(dst=Tier.DEVICE)
    machine.learn()
    callers.run()
    assert callers.results()["c0-0"][0] == expected_answer(prompt(1, 21), 4)
    check_whole(machine)


def test_the_loop_sleeps_until_it_is_woken():
    machine = hash_machine(host=256)
    callers = Callers(machine)
    on_the_host(machine, callers)
    loop = Loop(machine)
    try:
        updates = queue.SimpleQueue()
        submit = callers.submit([prompt(1, 21)], 0, max_new_tokens=4)
        loop.run(submit, submit.trackers(None, machine.clock, None, lambda _: updates.put))
        while loop.call(lambda: machine.ready):
            pass
        turns = loop.call(lambda: machine.turns)
        assert [loop.call(lambda: machine.turns) for _ in range(50)] == [turns] * 50, "nothing is tried again and again"
        machine.copies.finish(dst=Tier.DEVICE)
        loop.wake()
        while (output := updates.get(timeout=60)).finish is None:
            pass
        assert output.render()["output_ids"] == expected_answer(prompt(1, 21), 4)
    finally:
        loop.stop()


def test_who_waits_for_the_end_waits_no_longer_once_there_is_no_going_on():
    """A rank is lost while the engine is closed, and the engine's thread is in a step that never ends."""
    loop, gate = Loop(hash_machine()), threading.Event()
    loop.ask(gate.wait)
    threads = [threading.Thread(target=each, daemon=True) for each in (loop.stop, lambda: loop.fail("rank 1 is lost"))]
    try:
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert loop.failed
    finally:
        gate.set()


# -- several tokens a step --------------------------------------------------------------------------------------------


class Counting:
    """A grammar whose answers have so many tokens."""

    def __init__(self, tokens):
        self._left = tokens

    def allowed(self):
        return None

    def take(self, token):
        self._left -= 1
        return None if self._left else Finish("stop")


ASKED = st.lists(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 3),
            "length": st.integers(1, 24),
            "max_new_tokens": st.integers(0, 20),
            "min_new_tokens": st.integers(0, 4),
            "stop": st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789"), max_size=2).map(tuple),
            "grammar": st.none() | st.integers(1, 9),
            "logprobs": st.sampled_from([None, LogprobOptions(texts=False)]),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=120, deadline=None)
@given(ASKED, st.integers(2, 4), st.sampled_from([1, 4, 16]))
def test_several_tokens_a_step_give_what_one_gives(tokenizer, asked, per_step, page_size):
    """Whatever ends an answer, in the middle of a list or at its end: the same tokens, texts and KV, nothing more."""
    found = []
    for n in (1, per_step):
        machine = hash_machine(tokens=256, page_size=page_size, chunk=16, per_step=n)
        grammars = {f"c{i}-0": each["grammar"] for i, each in enumerate(asked)}
        callers = Callers(machine, tokenizer, lambda rid, g=grammars: None if g[rid] is None else Counting(g[rid]))
        for i, each in enumerate(asked):
            least = min(each["min_new_tokens"], each["max_new_tokens"])
            sampling = {"max_new_tokens": each["max_new_tokens"], "min_new_tokens": least, "stop": each["stop"]}
            callers.do(callers.submit([prompt(each["seed"], each["length"])], i, logprobs=each["logprobs"], **sampling))
        callers.run()
        check_whole(machine)
        last = {rid: updates[-1].render() for rid, updates in callers.updates.items()}
        cached = {}
        for i, each in enumerate(asked):
            ids = prompt(each["seed"], each["length"]) + last[f"c{i}-0"]["output_ids"]
            cached[i] = machine.scheduler.cache.match(Key(ids, machine.scheduler.key([0], "").namespace)).length
        found.append(
            {
                "tokens": {rid: r["output_ids"] for rid, r in last.items()},
                "text": {rid: r["text"] for rid, r in last.items()},
                "reasons": {rid: r["meta_info"]["finish_reason"] for rid, r in last.items()},
                "logprobs": {rid: r["meta_info"].get("output_token_logprobs") for rid, r in last.items()},
                "generated": machine.generated,
                "cached": cached,
            }
        )
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return Tokenizer(tiny_folder)


def test_tokens_after_the_last_are_dropped_and_their_slots_given_back():
    """An answer of one to four tokens a step that ends with a stop token, wherever that is in its list."""
    cut = 0
    for seed in range(40):
        machine = hash_machine(tokens=256, per_step=4, chunk=64)
        callers = Callers(machine)
        callers.do(callers.submit([prompt(seed, 8)], 0, max_new_tokens=60))
        callers.run()
        answer, reason = callers.results()["c0-0"]
        assert answer == expected_answer(prompt(seed, 8), 60)
        cut += reason == {"type": "stop", "matched": EOS} and machine.steps < len(answer)
        check_whole(machine)
        assert machine.generated == len(answer)
    assert cut > 10


def test_the_likeliest_tokens_are_those_of_each_tokens_own_place():
    machine = hash_machine(tokens=256, per_step=4)
    callers = Callers(machine)
    callers.do(callers.submit([prompt(1, 8)], 0, logprobs=LogprobOptions(top=1, texts=False), max_new_tokens=9))
    callers.run()
    (result,) = (updates[-1].render() for updates in callers.updates.values())
    tops = result["meta_info"]["output_top_logprobs"]
    assert [top[0][1] for top in tops] == result["output_ids"] == expected_answer(prompt(1, 8), 9)
