"""Machines without a thread: over a model that needs no arithmetic, or over a real one; and replaying their logs.

The keys and values of the model without arithmetic are hashes: a position's is made of its token's and of the one that
the page table gives for the position before. So a page that is another's, or was lost, gives other tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from copies import Copies, host_capacity
from guesses import Guessing
from rootcellar.cache import RadixCache, Tier, full
from rootcellar.config import EngineConfig
from rootcellar.engine.build import build
from rootcellar.engine.clock import Clock
from rootcellar.engine.commands import Submit
from rootcellar.engine.lifecycle import Lifecycle
from rootcellar.engine.requests import InputItem
from rootcellar.engine.step import Learn, Machine
from rootcellar.runner import Shapes
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Scheduler

VOCAB = 50
EOS = 7


class Time:
    """A clock in a test's hands."""

    def __init__(self):
        self.now = 0.0
        self.clock = Clock(lambda: self.now)


class HashPool:
    """Hashes by page and place in it."""

    def __init__(self, pages, page_size):
        self._shape = pages + 1, page_size
        self.allocate()

    def allocate(self):
        self.buffers = [np.zeros(self._shape, np.uint32)]

    def free(self):
        freed, self.buffers = sum(b.nbytes for b in self.buffers), []
        return freed

    @property
    def nbytes(self):
        return sum(b.nbytes for b in self.buffers)


@dataclass(frozen=True)
class HashUnread:
    """What a step over hashes gave, for whoever reads it."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top: tuple | None
    note: Callable[[], None]

    def read(self):
        self.note()
        return self.tokens, self.logprobs, self.top


class HashRunner:
    """Steps over hashes.

    ``fails``: of each step to come, in order, whether it breaks.
    ``fails_late``: of each that gives tokens, whether that is found when they are read. ``notes``: what was done.
    """

    def __init__(self, pool, page_size, chunk, running):
        self.params = {}
        self.pools = {"full": pool}
        self.pool_of = {"full": "full"}
        self.shapes = Shapes.of(chunk, running)
        self.spare = {}
        self._page_size = page_size
        self.fails: list[bool] = []
        self.fails_late: list[bool] = []
        self.notes: list[str] = []

    def kind_in(self, pool):
        return "full"

    def settle(self, batch, rows):
        """It has no states."""

    def step(self, batch, before=None):
        self.notes.append("step")
        tokens = batch.tokens
        if batch.sources is not None and before is not None:
            tokens = np.where(batch.sources >= 0, before.tokens[batch.sources], tokens)
        pool = self.pools["full"].buffers[0] = np.array(self.pools["full"].buffers[0])
        hashes = np.zeros(len(tokens), np.uint32)
        tile = len(tokens) // len(batch.rows)
        for at, (token, position) in enumerate(zip(tokens.tolist(), batch.positions.tolist(), strict=True)):
            if position < 0:
                continue
            table = batch.tables["full"][batch.rows[at // tile]]
            before = pool[self._slot(table, position - 1)] if position else 0
            hashes[at] = pool[self._slot(table, position)] = zlib.crc32(token.to_bytes(4, "little"), int(before))
        if self.fails and self.fails.pop(0):
            raise RuntimeError("the device is on fire")
        return hashes[batch.last].astype(np.int64) % VOCAB, None

    def _slot(self, table, position):
        page = table[position // self._page_size]
        assert page > 0
        return page, position % self._page_size

    def sample(self, scores, rows, k=0):
        """Every token's logprob is a function of it; the likeliest are it alone."""
        top = (scores[:, None] * -1.0, scores[:, None]) if k else None
        late = bool(self.fails_late and self.fails_late.pop(0))

        def note():
            self.notes.append("read")
            if late:
                raise RuntimeError("the device was on fire")

        return HashUnread(scores.astype(np.int32), -np.asarray(scores, np.float32) / VOCAB, top, note)


def hash_machine(
    tokens=64, page_size=4, chunk=8, running=4, time=None, host=0, per_step=1, storage=0, copies=Copies, **options
):
    """A machine over hashes; ``host``, ``storage``: tokens on farther tiers, which ``machine.copies`` copies to and
    from, made by ``copies``.

    ``per_step``: most tokens that a step gives a request. ``options`` are the machine's own.
    """
    kinds, capacity = [full("full", (0,))], {("full", Tier.DEVICE): tokens}
    if host:
        capacity |= host_capacity(kinds, host)
    if storage:
        capacity |= host_capacity(kinds, storage, Tier.STORAGE)
    cache = RadixCache(
        kinds,
        page_size=page_size,
        capacity=capacity,
        max_leases=running,
        max_length=tokens,
    )
    runner = HashRunner(HashPool(tokens // page_size, page_size), page_size, chunk, running)
    scheduler = Scheduler(
        cache,
        chunked_prefill_size=chunk,
        max_running_requests=running,
        tiles_of=runner.shapes.tiles_of,
        max_tiles=runner.shapes.prefill_tiles,
        guesses=Guessing(per_step - 1, VOCAB) if per_step > 1 else None,
    )
    held = np.zeros((host // page_size + 1, page_size), np.uint32)
    mover = copies(lambda kind, tier: runner.pools[kind].buffers[0] if tier is Tier.DEVICE else held)
    life = Lifecycle(scheduler, runner, None, "hashes", mover=mover if host else None)
    return _machine(life, running, tokens, time, mover, **options)


def real_machine(folder, time=None, **settings):
    """A machine over a model's folder, without a tokenizer."""
    parts = build(EngineConfig.from_kwargs(model_path=folder, skip_tokenizer_init=True, **settings))
    return _machine(
        Lifecycle.of(parts), parts.max_running_requests, parts.total_tokens, time, Copies(None), overlap=parts.overlap
    )


def _machine(life, running, tokens, time, copies, make=Machine, **options):
    settings = {"max_queued": None, "log_interval": 1e9, "clock": (time or Time()).clock, **options}
    machine = make(life, max_running=running, total_tokens=tokens, **settings)
    machine.copies = copies
    return machine


def expected_answer(prompt, most):
    """What the model of hashes must say."""
    state, answer = 0, []
    for token in prompt:
        state = zlib.crc32(int(token).to_bytes(4, "little"), state)
    while len(answer) < most and EOS not in answer:
        answer.append(state % VOCAB)
        state = zlib.crc32(answer[-1].to_bytes(4, "little"), state)
    return answer


class Callers:
    """Those who ask one machine: what they got, by request."""

    def __init__(self, machine, tokenizer=None, grammar=lambda rid: None):
        """``grammar(rid)``: what a request's answer must follow."""
        self.machine = machine
        self._tokenizer = tokenizer
        self._grammar = grammar
        self.updates: dict[str, list] = {}

    def submit(self, prompts, call, deadline=None, logprobs=None, stop_ids=(EOS,), **sampling):
        """The command that asks for the continuation of ``prompts``."""
        params = SamplingParams(**sampling)
        items = tuple(
            InputItem(np.asarray(p), params, frozenset(stop_ids), 0, (f"c{call}", f"c{call}-{i}"), logprobs, 0, "")
            for i, p in enumerate(prompts)
        )
        return Submit(items, call, "", True, 0.0, deadline)

    def do(self, command):
        """Give a command; its reply."""
        live = []
        if isinstance(command, Submit):
            grammars = [self._grammar(item.names[-1]) for item in command.items]
            live = [command.trackers(self._tokenizer, self.machine.clock, grammars, self._deliver_to(command))]
        reply: Future = Future()
        self.machine.do(command, reply, *live)
        return reply

    def _deliver_to(self, command):
        kept = [self.updates.setdefault(item.names[-1], []) for item in command.items]
        return lambda i: kept[i].append

    def step(self):
        """One turn, as the loop has it."""
        try:
            self.machine.step()
        except RuntimeError as error:
            self.machine.recover(error)
        self.machine.scheduler.cache.check()

    def results(self):
        """By request: its tokens, and why it ended (None: it has not)."""
        latest = {rid: updates[-1].render() for rid, updates in self.updates.items() if updates}
        return {rid: (r["output_ids"], r["meta_info"]["finish_reason"]) for rid, r in latest.items()}

    def run(self, limit=10_000):
        """Steps until nothing is left to do, with copies that end and steps that fail."""
        for _ in range(limit):
            self.machine.learn()
            if self.machine.ready:
                self.step()
            elif self.machine.scheduler.idle or not self.machine.copies.finish(dst=Tier.DEVICE):
                return
        raise AssertionError("the machine does not come to rest")


def replay(log, turns, callers):
    """Carry out a log, up to so many turns, on the machine of ``callers``."""
    machine = callers.machine
    for turn, command in log:
        while machine.turns < turn:
            machine.step()
        if isinstance(command, Learn):
            machine.copies.follow(command.reports.events)
        callers.do(command)
    while machine.turns < turns:
        machine.step()


def state_of(machine):
    """What must be equal after equal commands."""
    scheduler, cache = machine.scheduler, machine.scheduler.cache
    cache.check()
    return {
        "waiting": [(r.rid, r.length, r.retractions) for r in scheduler.waiting],
        "running": [(r.rid, r.length, r.computed, r.committed, r.stage) for r in scheduler.running],
        "retractions": scheduler.retractions,
        "counts": (machine.steps, machine.generated, machine.prompted),
        "paused": (machine.paused, sorted(machine.life.released), scheduler.admitting),
        "stats": cache.stats(),
        "tables": {kind.name: cache.tables[kind.name].tolist() for kind in cache.kinds},
        "tree": cache.tree(10_000),
    }
