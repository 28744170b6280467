"""Machines without a thread: over a model that needs no arithmetic, or over a real one; and replaying their logs.

The keys and values of the model without arithmetic are hashes: a position's is made of its token's and of the one that
the page table gives for the position before. So a page that is another's, or was lost, gives other tokens.
"""

from __future__ import annotations

import zlib
from concurrent.futures import Future

import numpy as np

from rootcellar.cache import RadixCache, Tier, full
from rootcellar.config import EngineConfig
from rootcellar.engine.build import build
from rootcellar.engine.clock import Clock
from rootcellar.engine.commands import Submit
from rootcellar.engine.lifecycle import Lifecycle
from rootcellar.engine.requests import Item
from rootcellar.engine.step import Machine
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


class HashRunner:
    """Steps over hashes.

    ``fails``: of each step to come, in order, whether it breaks.
    """

    def __init__(self, pool, page_size, chunk, running):
        self.params = {}
        self.pools = {"full": pool}
        self.pool_of = {"full": "full"}
        self.shapes = Shapes.of(chunk, running)
        self._page_size = page_size
        self.fails: list[bool] = []

    def kind_in(self, pool):
        return "full"

    def step(self, batch):
        pool = self.pools["full"].buffers[0] = np.array(self.pools["full"].buffers[0])
        hashes = np.zeros(len(batch.tokens), np.uint32)
        tile = len(batch.tokens) // len(batch.rows)
        for at, (token, position) in enumerate(zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True)):
            if position < 0:
                continue
            table = batch.tables["full"][batch.rows[at // tile]]
            before = pool[self._slot(table, position - 1)] if position else 0
            hashes[at] = pool[self._slot(table, position)] = zlib.crc32(token.to_bytes(4, "little"), int(before))
        if self.fails and self.fails.pop(0):
            raise RuntimeError("the device is on fire")
        return hashes[batch.last], None

    def _slot(self, table, position):
        page = table[position // self._page_size]
        assert page > 0
        return page, position % self._page_size

    def sample(self, scores, rows):
        return (scores % VOCAB).astype(np.int32), np.zeros(len(scores), np.float32)


def hash_machine(tokens=64, page_size=4, chunk=8, running=4, time=None, **options):
    """A machine over hashes; ``options`` are the machine's own."""
    cache = RadixCache(
        [full("full", (0,))],
        page_size=page_size,
        capacity={("full", Tier.DEVICE): tokens},
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
    )
    life = Lifecycle(scheduler, runner, None, "hashes")
    return _machine(life, running, tokens, time, **options)


def real_machine(folder, time=None, **settings):
    """A machine over a model's folder, without a tokenizer."""
    parts = build(EngineConfig.from_kwargs(model_path=folder, skip_tokenizer_init=True, **settings))
    life = Lifecycle(parts.scheduler, parts.runner, parts.reload, parts.weights)
    return _machine(life, parts.max_running_requests, parts.total_tokens, time)


def _machine(life, running, tokens, time, **options):
    settings = {"max_queued": None, "log_interval": 1e9, "clock": (time or Time()).clock, **options}
    return Machine(life, max_running=running, total_tokens=tokens, **settings)


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

    def __init__(self, machine):
        self.machine = machine
        self.updates: dict[str, list] = {}

    def submit(self, prompts, call, deadline=None, **sampling):
        """The command that asks for the continuation of ``prompts``."""
        params = SamplingParams(**sampling)
        items = tuple(
            Item(np.asarray(p), params, frozenset([EOS]), 0, (f"c{call}", f"c{call}-{i}"), None, 0, "")
            for i, p in enumerate(prompts)
        )
        return Submit(items, call, "", True, 0.0, deadline)

    def do(self, command):
        """Give a command; its reply."""
        live = []
        if isinstance(command, Submit):
            live = [command.trackers(None, self.machine.clock, None, self._deliver_to(command))]
        reply: Future = Future()
        self.machine.do(command, reply, *live)
        return reply

    def _deliver_to(self, command):
        kept = [self.updates.setdefault(item.names[-1], []) for item in command.items]
        return lambda i: kept[i].append

    def results(self):
        """By request: its tokens, and why it ended (None: it has not)."""
        latest = {rid: updates[-1].render() for rid, updates in self.updates.items() if updates}
        return {rid: (r["output_ids"], r["meta_info"]["finish_reason"]) for rid, r in latest.items()}

    def run(self, limit=10_000):
        """Steps until nothing is left to do."""
        for _ in range(limit):
            if not self.machine.ready:
                return
            self.machine.step()
            self.machine.scheduler.cache.check()
        raise AssertionError("the machine does not come to rest")


def replay(log, turns, callers):
    """Carry out a log, up to so many turns, on the machine of ``callers``."""
    machine = callers.machine
    for turn, command in log:
        while machine.turns < turn:
            machine.step()
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
