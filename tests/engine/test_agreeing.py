"""Ranks agree: what all saw is learned, the least counts, and whatever their movers and stores do, they stay one."""

import pickle
import threading
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import Callers, expected_answer, hash_machine, state_of
from wires import Wires

from copies import Copies
from rootcellar.cache import Key, Question, Tier, full, sliding_window
from rootcellar.engine.agreeing import Agreement, PageByPage, Seen, Unopened
from rootcellar.engine.commands import Abort, Attach, Detach, Flush, Leave, Pause, Release, Resume, Submit
from rootcellar.engine.exchange import _load
from rootcellar.engine.ranks import Do, FollowingLoop, FollowingMachine, LeadingMachine
from rootcellar.errors import ConfigError, EngineError
from rootcellar.tiers.prefetching import PrefetchSettings

# -- the merge ---------------------------------------------------------------------------------------------------------


@given(st.data())
def test_what_all_saw_is_agreed_once_whatever_the_order(data):
    """Each rank sees each move and answer once, in an order and with an outcome of its own."""
    ranks, moves, serials = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6)), data.draw(st.integers(0, 3))
    pages = data.draw(st.integers(0, 5))
    ok = [[data.draw(st.booleans()) for _ in range(moves)] for _ in range(ranks)]
    held = [[bytes(data.draw(st.lists(st.integers(0, 1), min_size=pages, max_size=pages))) for _ in range(serials)]
            for _ in range(ranks)]  # fmt: skip
    rounds = 4
    when = [[data.draw(st.integers(0, rounds - 1)) for _ in range(moves + serials)] for _ in range(ranks)]
    agreement, agreed, known = Agreement(ranks), Counter(), {}
    for now in range(rounds):
        seen = [
            Seen(
                tuple(m for m in range(moves) if when[r][m] == now and ok[r][m]),
                tuple(m for m in range(moves) if when[r][m] == now and not ok[r][m]),
                tuple((s, held[r][s]) for s in range(serials) if when[r][moves + s] == now),
            )
            for r in range(ranks)
        ]
        found = agreement.merge(seen)
        for move in (*found.done, *found.failed):
            agreed[move] += 1
            assert now == max(when[r][move] for r in range(ranks))  # not before all saw it, nor later
            assert (move in found.done) == all(ok[r][move] for r in range(ranks))
        for serial, least in found.held:
            assert now == max(when[r][moves + serial] for r in range(ranks))
            assert list(least) == [min(held[r][serial][p] for r in range(ranks)) for p in range(pages)]
            known[serial] = least
    assert agreed == Counter(range(moves))
    assert len(known) == serials


@given(st.integers(0, 8), st.integers(0, 3), st.data())
def test_a_page_by_page_answer_says_each_page(total, first, data):
    kinds = (full("full", (0,)), sliding_window("window", (1,), 8))
    firsts = (min(first, total), data.draw(st.integers(0, total)))
    pages = tuple((kind.name, bytes([p])) for kind, f in zip(kinds, firsts, strict=True) for p in range(f, total))
    question = Question(Key(list(range(4 * total))), Tier.STORAGE, kinds, 4, 0, firsts, pages)
    asked = PageByPage.of(question)
    held = data.draw(st.lists(st.booleans(), min_size=len(pages), max_size=len(pages)))
    assert list(asked.held(asked.answer(held))) == [int(each) for each in held]
    assert not any(asked.held(()))  # nothing is known where nothing was found, or the store failed
    assert Question.answer(asked, held) == question.answer(held)


# -- machines that agree ----------------------------------------------------------------------------------------------


class Busy(Copies):
    """Copies that end by themselves while nobody looks, some badly, and a store that loses pages."""

    def __init__(self, pool_of, rng, bad):
        super().__init__(pool_of)
        self._rng, self._bad = rng, bad

    def reports(self):
        for _ in range(self._rng.integers(4)):
            self.finish(ok=self._rng.random() >= self._bad) or self.answer(ok=self._rng.random() >= self._bad)
        return super().reports()

    def answer(self, *, ok=True):
        for page in [page for page in self.stored if self._rng.random() < self._bad]:
            del self.stored[page]
        return super().answer(ok=ok)


class Asking(Callers):
    """Callers of rank 0, where a store goes with its command."""

    def do(self, command):
        if not isinstance(command, Attach):
            return super().do(command)
        reply = Future()
        self.machine.do(command, reply, "a store")
        return reply


class Ranks:
    """Machines over hashes that are one engine; rank 0 is the test's, each other one has a thread."""

    def __init__(self, count=2, seed=0, bad=0.0, delay=0.0, **options):
        self.wires = Wires(count, seed, delay, lambda what: _load(pickle.dumps(what)))
        sizes = {"tokens": 64, "host": 128, "storage": 512, **options}

        def machine(rank, make, *more):
            rng = np.random.default_rng([seed, rank])
            return hash_machine(
                **sizes, copies=lambda pool_of: Busy(pool_of, rng, bad),
                make=lambda life, **given: make(life, self.wires.ends[rank], *more, **given),
            )  # fmt: skip

        self.callers = Asking(machine(0, LeadingMachine))
        self.leader = self.callers.machine
        self.others = [machine(rank, FollowingMachine, self._live) for rank in range(1, count)]
        self.errors = [""] * count
        self.threads = [threading.Thread(target=self._follow, args=(m,), daemon=True) for m in self.others]
        for thread in self.threads:
            thread.start()

    def _live(self, command):
        if isinstance(command, Attach):
            return ("a store",)
        if isinstance(command, Submit):
            return (command.trackers(None, self.leader.clock, None, lambda _: lambda output: None),)
        return ()

    def _follow(self, machine):
        exchange = machine.exchange
        try:
            while (told := exchange.next_led()) is not None:
                machine.follow(told)
        except Exception as error:
            self.errors[exchange.rank] = str(error)
            exchange.close(str(error))

    def turn(self):
        self.leader.agreed.noted()
        self.leader.learn()
        if self.leader.ready:
            self.leader.step()

    def run(self, limit=100_000):
        """Until nothing is left to do."""
        for _ in range(limit):
            self.turn()
            if self.leader.scheduler.idle:
                return
        raise AssertionError("the ranks do not come to rest")

    def end(self):
        """All ranks end, having done everything; what they are."""
        self.wires.ends[0].lead(None)
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        return [state_of(machine) for machine in (self.leader, *self.others)]

    def attach(self):
        return self.callers.do(Attach("file", "wait_complete", PrefetchSettings(threshold=4), {}))


def ask(ranks, rng, call):
    """A request that shares its beginning with others."""
    prompt = [int(rng.integers(2)) for _ in range(int(rng.integers(1, 30)))]
    ranks.callers.do(ranks.callers.submit([prompt], call, max_new_tokens=4))
    return prompt


def test_what_a_rank_tells_while_rank_0_turns_to_the_agreement_is_not_forgotten():
    """It may have been seen when that rank had said its part already, and nobody else will speak of it."""
    ranks = Ranks()
    led, agreed = ranks.leader.exchange, ranks.leader.agreed
    lead = led.lead

    def told(what):
        lead(what)
        agreed.noted()

    agreed.noted()
    led.lead = told
    ranks.leader.learn()
    led.lead = lead
    words = ranks.wires.words
    ranks.leader.learn()
    assert ranks.wires.words > words
    words = ranks.wires.words
    ranks.leader.learn()
    assert ranks.wires.words == words
    ranks.end()


def test_what_was_led_is_not_done_once_it_is_over():
    """The engine's thread may be in a step that never ends: whoever ends the loop must not begin another."""
    wires, gate = Wires(2), threading.Event()
    loop = FollowingLoop(
        hash_machine(make=lambda life, **given: FollowingMachine(life, wires.ends[1], lambda _: (), **given))
    )
    loop.ask(gate.wait)
    loop.take(Do(Pause("in_place")))
    loop.fail("rank 0 is lost")
    gate.set()
    assert not loop.machine.paused


def test_a_command_that_fails_on_one_rank_alone_leaves_no_other_waiting():
    ranks = Ranks()

    def refuse():
        raise OSError("its disk is gone")

    ranks.others[0].life.flush = refuse
    with pytest.raises(EngineError, match="its disk is gone"):
        ranks.callers.do(Flush()).result()


def test_weights_that_are_others_on_one_rank_are_found_before_the_next_step():
    ranks = Ranks()
    ranks.others[0].life.weights = "others, read again"
    ranks.callers.do(Resume(("kv_cache",))).result()
    ask(ranks, np.random.default_rng(0), 0)
    with pytest.raises(EngineError, match="rank 1 parted from rank 0 before turn 0"):
        ranks.run()


def test_a_store_that_is_not_taken_since_another_rank_has_none_is_closed():
    class Opened:
        closed = False

        def close(self):
            self.closed = True

    ranks, opened = Ranks(3), Opened()
    for machine, found in zip(ranks.others, (opened, Unopened("no such folder")), strict=True):
        machine._live = lambda _, found=found: (found,)
    with pytest.raises(ConfigError, match="rank 2: no such folder"):
        ranks.attach().result()
    ranks.end()
    assert opened.closed


@pytest.mark.parametrize(
    ("count", "seed", "requests"),
    [(2, 0, 120), (3, 1, 60), *(pytest.param(2, seed, 2500, marks=pytest.mark.long) for seed in range(2, 6))],
)
def test_ranks_whose_stores_and_copies_differ_stay_one(count, seed, requests):
    """Random pages are missing on random ranks, copies fail on some and take their time: no wrong token, no hang."""
    rng = np.random.default_rng(seed)
    ranks = Ranks(count, seed, bad=0.1)
    ranks.callers.do(Resume(("kv_cache",)))
    ranks.attach().result()
    prompts = {}
    for call in range(requests):
        prompts[f"c{call}-0"] = ask(ranks, rng, call)
        turns = int(rng.integers(4))
        while turns > 0 or len(ranks.leader.scheduler.waiting) > 20:
            ranks.turn()
            turns -= 1
        if rng.random() < 0.02:  # what waits for copies while it is carried out
            ranks.callers.do(Release(("kv_cache",), "retract", bool(rng.integers(2)), False)).result()
            ranks.callers.do(Resume(("kv_cache",))).result()
        if rng.random() < 0.02:
            ranks.callers.do(Abort(f"c{call}", None, "asked"))
    ranks.run()
    ranks.callers.do(Leave())
    while ranks.callers.do(Detach()).result() is None:
        ranks.turn()
    ranks.callers.do(Flush()).result()
    states = ranks.end()
    assert all(state == states[0] for state in states)
    results = ranks.callers.results()
    for rid, prompt in prompts.items():
        tokens, reason = results[rid]
        assert tokens == expected_answer(prompt, 4)[: len(tokens)]
        assert reason["type"] != "abort" or reason["cause"] == "asked"
    stats = ranks.leader.scheduler.cache.stats()
    assert all(shelf.free == shelf.size for shelf in stats.shelves.values())
