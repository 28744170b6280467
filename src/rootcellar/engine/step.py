"""The engine without its thread: commands and steps change it, and nothing else does.

A step: learn, plan, dispatch, run, take. Where that changes no result the next one is planned ahead and handed to the
device before what this one gave is taken, which then happens while the device computes (``scheduler/ahead.py``).

Between two steps come commands (``commands.py``): first what is under way is taken, so they find what they would find
otherwise. What movers report is learned as one. The same commands between the same steps leave the same requests,
tokens and cache: ``log`` can record them. What depends on time is a command that carries it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from rootcellar.cache import KVEvent, Reports, digests
from rootcellar.engine.apart import PeerEvent, Peers
from rootcellar.engine.chosen import Chosen, Launched, parts_of, read, rows_of, sampled_of, score_prompts, settled_rows
from rootcellar.engine.clock import Clock
from rootcellar.engine.copies import forget_device
from rootcellar.engine.hints import Hints
from rootcellar.engine.lifecycle import Lifecycle
from rootcellar.engine.output import Tracker
from rootcellar.engine.pins import Pins
from rootcellar.engine.places import Places
from rootcellar.engine.recorder import Recorder
from rootcellar.engine.roster import Roster
from rootcellar.engine.sides import Side
from rootcellar.engine.trace_log import TraceLog
from rootcellar.errors import EngineError, RootcellarError
from rootcellar.runner import Batch, Unread
from rootcellar.scheduler import Finish, Plan, Prefetcher, Rates, Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learn:
    """The command that takes in what those saw who copy between tiers; ``rates`` were measured by ``now``."""

    reports: Reports
    rates: Rates
    now: float
    rest: None = None

    def run(self, machine: Machine) -> None:
        """See above."""
        machine.life.missed = Reports()  # it is among the reports
        machine.scheduler.loads.learn(self.rates, self.now)
        machine.scheduler.learn(self.reports.events)
        machine.prefetcher.learned(self.reports)
        machine.peers.learned()
        machine.note_rooms()


@dataclass(frozen=True)
class Meet:
    """The command that takes in what other nodes did by ``now``."""

    events: tuple[PeerEvent, ...]
    now: float
    rest: None = None

    def run(self, machine: Machine) -> None:
        """See above."""
        machine.peers.meet(self.events, self.now)
        machine.note_rooms()


class AnyCommand(Protocol):
    """A command, as the machine sees it."""

    @property
    def rest(self) -> str | None:
        """What becomes of what runs: see ``Command``."""

    def run(self, machine: Machine, *live: Any) -> Any:
        """Do it."""


class Machine:
    """All that an engine is but its thread.

    Attributes:
        life, scheduler, runner: what is computed with.
        roster, trackers: the requests that have not ended.
        places: who may still wait.
        pins, hints: what is kept for tenants, and what is said of prompts' future.
        prefetcher: what waiting requests want of a store.
        peers: what other nodes have to do with requests.
        clock, recorder: the time; what was counted, and what happened lately.
        paused: whether nothing is computed until somebody says so.
        turns: how often a step was tried.
        steps, generated, prompted: steps run, tokens chosen, prompt tokens computed, since the start.
        log: each command with the turns before it, from when this is made a list.
    """

    def __init__(
        self,
        life: Lifecycle,
        *,
        max_running: int,
        max_queued: int | None,
        total_tokens: int,
        clock: Clock,
        log_interval: float,
        overlap: bool = True,
        prefetcher: Prefetcher | None = None,
        side: Side | None = None,
        tell: Callable[[Sequence[KVEvent]], None] | None = None,
        trace: TraceLog | None = None,
    ) -> None:
        """``max_running`` requests run and ``max_queued`` (None: any number) wait; the cache holds ``total_tokens``.

        ``log_interval``: seconds between two lines of the log about the work under way. ``overlap``: whether steps may
        be planned ahead. ``prefetcher``: the scheduler's; None: there will be no store. ``side``: of prefill and
        decode; None: both. ``tell``: is told what the cache stores and removes. ``trace``: is told what was asked.
        """
        self.life = life
        self.scheduler = life.scheduler
        self.runner = life.runner
        self.clock = clock
        self.recorder = Recorder(life.scheduler, life.runner, log_interval, clock, total_tokens, trace)
        self.roster = Roster()
        self.trackers = self.roster.trackers
        self.places = Places(life.scheduler, max_running, max_queued)
        self.pins = Pins(life.scheduler.cache, total_tokens)
        self.scheduler.make_way = self.pins.make_way
        names_of = partial(digests, page_size=life.scheduler.cache.page_size)
        self.prefetcher = prefetcher or Prefetcher(life.scheduler, names_of)
        self.peers = Peers() if side is None else side(life.scheduler, self.end, self.prefetcher.arrived)
        self.hints = Hints(life.scheduler, self.pins, self.prefetcher)
        self.paused = False
        self.turns = self.steps = self.generated = self.prompted = 0
        self.log: list[tuple[int, AnyCommand]] | None = None
        self._mover = life.mover
        self._tell = tell
        self._overlap = overlap
        self._launched: Launched | None = None
        """The step whose tokens were not taken when the turn ended: planned ahead."""
        self._given = None if life.encodings is None else life.encodings.given
        self._planned: Plan | None = None
        """The step that is being begun or taken: whose fault a failure is."""
        self._encoded = False
        """Whether the last turn went to pictures."""
        self._stuck = False
        """Whether nothing can be computed until there is news."""
        self._at_rest: deque[tuple[AnyCommand, Future[Any], tuple[Any, ...]]] = deque()

    # -- commands -------------------------------------------------------------------------------------------------

    def do(self, command: AnyCommand, reply: Future[Any], *live: Any) -> None:
        """Carry out ``command``; ``reply`` has its result or its error, later if it must wait until nothing runs."""
        if self.log is not None:
            self.log.append((self.turns, command))
        if not isinstance(command, Learn | Meet):  # which the scheduler may do at any time
            self._catch_up()
        self._stuck = False
        if command.rest is None or self._come_to_rest(command.rest, reply):
            self._carry_out(command, reply, live)
        elif not reply.done():
            self._at_rest.append((command, reply, live))
        self._rested()
        self._dispatch()
        self.places.look()

    def _carry_out(self, command: AnyCommand, reply: Future[Any], live: tuple[Any, ...]) -> None:
        try:
            reply.set_result(command.run(self, *live))
        except BaseException as error:
            if not isinstance(error, RootcellarError):
                log.exception("%s failed", type(command).__name__)
            reply.set_exception(error)

    def _come_to_rest(self, mode: str, reply: Future[Any]) -> bool:
        """Whether nothing runs now; if nothing ever will come to its end, ``reply`` has the error."""
        if mode == "abort":
            self.end_all(self.roster.of(None), Finish.abort("asked", "aborted to bring the engine to rest"))
        elif mode == "retract":
            self.scheduler.retract_all()
        if not self.scheduler.running:
            return True
        if self.paused:
            n = len(self.scheduler.running)
            reply.set_exception(
                EngineError(f"{n} requests run and generation is paused: continue it, or use mode abort or retract")
            )
        else:
            self.scheduler.admitting = False
        return False

    def _rested(self) -> None:
        """Do what waited for the last running request to end."""
        if self._at_rest and not self.scheduler.running:
            self._catch_up()  # with what ended unexpectedly
            while self._at_rest:
                self._carry_out(*self._at_rest.popleft())
            self.scheduler.admitting = True

    def require_nothing_computed(self, what: str) -> None:
        """Raise ``EngineError`` where ``what`` would take away the KV of requests."""
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        # While nothing is computed, waiting requests hold no memory: flushing is safe, and wanted between rollouts.
        if running or (waiting and not (self.paused or self.life.released)):
            raise EngineError(
                f"{what} refused: {running} requests run and {waiting} wait; let them end or abort them first"
            )

    def end_all(self, trackers: Iterable[Tracker], finish: Finish) -> int:
        """End these requests; how many they are."""
        ended = [tracker.request for tracker in trackers]
        for request in ended:
            self.end(request, finish)
        return len(ended)

    def end(self, request: Request, finish: Finish) -> None:
        """End a request, and tell its caller."""
        self.scheduler.finish(request, finish)
        self._close(request)

    def _close(self, request: Request) -> None:
        tracker = self.roster.remove(request)
        tracker.note_stage()
        self.recorder.request_ended(tracker)
        try:
            try:
                self.prefetcher.ended(request)
            finally:  # whatever the store does, its pages are not held for another node for ever
                self.peers.ended(request)
            if request.cached is not None:
                self.pins.came(request.tenant, request.key(request.prompt_length))
            if self.life.routing is not None:
                self.life.routing.read(request, tracker.experts)
            tracker.close()
        except Exception as error:  # neither stops the others nor leaves its caller waiting
            log.exception("could not make the end of request %s", request.rid)
            tracker.fail("failed", f"its output could not be made: {type(error).__name__}: {error}")

    # -- time -----------------------------------------------------------------------------------------------------

    @property
    def next_end(self) -> float | None:
        """When something will next be late, if nothing happens before; None: never."""
        others = self.pins, self.prefetcher, self.hints, self.peers
        ends = self.roster.next_deadline, *(each.next_end for each in others)
        return min((end for end in ends if end is not None), default=None)

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def able(self) -> bool:
        """Whether anything may be computed now."""
        return not (self.paused or self.life.released)

    @property
    def ready(self) -> bool:
        """Whether there is something to compute, and it may be, and did not turn out to wait for bytes."""
        return self.able and (self._launched is not None or not (self.scheduler.idle or self._stuck))

    def learn(self) -> None:
        """Take in what movers saw since the last time, and other nodes."""
        if events := self.peers.take():
            met: Future[None] = Future()
            self.do(Meet(tuple(events), self.clock.now()), met)
            met.result()
        if self._mover is None:
            return
        # Copies that were learned while they were waited for are known no more: to learn them again is no work.
        if reports := self.life.missed + self._mover.reports():
            self.learn_of(reports, *self.measured())

    def measured(self) -> tuple[Rates, float]:
        """How fast copies and steps were by now, and when that is."""
        assert self._mover is not None
        now = self.clock.now()
        return self.recorder.meter.rates(self._mover.stats(), now), now

    def learn_of(self, reports: Reports, rates: Rates, now: float) -> None:
        """Take in what movers saw."""
        learnt: Future[None] = Future()
        self.do(Learn(reports, rates, now), learnt)
        learnt.result()  # or what went wrong, which nobody else would be told of

    def step(self) -> None:
        """One turn: what the step under way gave, or one that can be planned; the next one may be begun before."""
        self.turns += 1
        self._planned = None
        launched, self._launched = self._launched, None
        if launched is None and (plan := self._plan()) is not None:
            launched = self._run(plan, None)
        if launched is not None:
            try:
                self._launched = self._run_ahead(launched)
            finally:  # whatever becomes of the next one, this one gave what it gave
                self._take(launched)
            if self._launched is not None and not launched.plan.decode:
                for chunk in self._launched.plan.chunks:  # who decodes from now on, unless it ended
                    if chunk.request.finish is None:
                        self.trackers[chunk.request].note_stage()
        self._step_ended()

    def note_rooms(self) -> None:
        """Record the stages of requests that have to do with other nodes: no step changes them."""
        for request in [request for request in self.trackers if request.room is not None]:
            self.trackers[request].note_stage()

    def _step_ended(self) -> None:
        if self.scheduler.giving:
            self.note_rooms()
        self._dispatch()
        self._planned = None
        self._rested()
        self.places.look()

    def _catch_up(self) -> None:
        """Take what is under way."""
        launched, self._launched = self._launched, None
        try:
            if launched is not None:
                self._take(launched)
                self._step_ended()
        except Exception as error:  # whoever gave the command has no part in it
            log.exception("a step failed; its requests end with an error")
            self.recover(error)

    def _run_ahead(self, before: Launched) -> Launched | None:
        """Begin the step after the one under way; None: there is none that may be begun now."""
        self._planned = None
        if not self._overlap:
            return None
        self.recorder.step_begins()
        if (plan := self.scheduler.plan_ahead(before.plan)) is None:
            return None
        self.recorder.planned(self.trackers)
        return self._run(plan, before.unread)

    def _plan(self) -> Plan | None:
        # Pictures take as long as a step: whoever comes meanwhile is in the next one, and does not wait for both.
        encodings = self.life.encodings
        self.recorder.step_begins()
        due = not self._encoded
        self._encoded = encodings is not None and due and encodings.turn(self.end)
        if self._encoded:
            self.recorder.encoded()
            return None
        plan = self.scheduler.plan()
        self.recorder.planned(self.trackers)
        for request in self.scheduler.failed:
            self._close(request)
        self.scheduler.failed.clear()
        if plan is None and due:  # else a picture may be what is waited for, and it has the next turn
            self._unblock()
        for request in self.scheduler.loading if plan is None else [*self.scheduler.loading, *plan.requests]:
            self.trackers[request].note_stage()
        return plan

    def _unblock(self) -> None:
        """Nothing can be computed although something waits: for bytes, until they come; else it ends with the reason
        rather than hang.
        """
        if self.scheduler.awaits_bytes:
            self._stuck = True
        elif not self.scheduler.idle and not self.scheduler.running and not self.pins.make_way():
            request = next(iter(self.scheduler.waiting))
            available = self.scheduler.cache.available_tokens()
            self.end(request, Finish.abort("no_room", f"cannot start: {available} tokens of KV cache are available"))

    def _dispatch(self) -> None:
        """Hand over the copies that were planned, before the step writes where their sources are, and ask the store."""
        self.peers.dispatch()
        if self._tell is not None and (events := self.scheduler.cache.take_events()):
            self._tell(events)
        if self._mover is None:
            return
        if moves := self.scheduler.cache.moves():
            self._mover.dispatch(moves)
        for serial, question in self.prefetcher.questions():
            self._mover.ask(serial, question)

    def _run(self, plan: Plan, before: Unread | None) -> Launched:
        """Hand the step to the device; ``before``: what the one gives that it was planned after."""
        self._planned = plan
        self._dispatch()
        cache, runner = self.scheduler.cache, self.runner
        parts = parts_of(plan, self._given)
        tables = {kind.name: cache.tables[kind.name] for kind in cache.kinds}
        batch = Batch.build(parts, tables, 1 if plan.decode else runner.shapes.tile, plan.sources, runner.spare)
        if self.life.routing is not None:
            self.life.routing.note(plan, {c.request: self.trackers[c.request].experts for c in plan.chunks}, tables)
        start = self.recorder.dispatched()
        scores, hidden = runner.step(batch, before)
        score_prompts(runner, plan, self.trackers, [batch.starts[row] for row in rows_of(plan)], hidden)
        if not plan.decode:
            self.prompted += sum(c.stop - c.start for c in plan.chunks)
        if not any(c.ends for c in plan.chunks):
            return Launched(plan, batch, scores, None, start)
        wanted = (self.trackers[c.request].logprobs for c in plan.chunks if c.ends)
        k = max((kept.options.top for kept in wanted if kept is not None), default=0)
        return Launched(plan, batch, scores, runner.sample(scores, sampled_of(plan, self.trackers), k), start)

    def _take(self, launched: Launched) -> None:
        """Wait for what a step gave; give each request its tokens, and its caller the news."""
        plan, other = launched.plan, self._planned
        self._planned = plan
        chosen = read(launched)
        self.recorder.computed(launched.start, plan, self.trackers)
        trackers = {i: self.trackers[c.request] for i, c in enumerate(plan.chunks) if c.request.finish is None}
        if trackers:  # or nobody wants it after all
            self._follow_up(launched, chosen, trackers)
        self._planned = other

    def _follow_up(self, launched: Launched, chosen: Chosen, trackers: dict[int, Tracker]) -> None:
        self.steps += 1
        now, version = self.clock.now(), self.life.version

        def follow(i: int, j: int) -> Finish | None:
            try:
                return self._follow(trackers[i], chosen, i, j, version, now)
            except Exception as error:  # one request's output is no other's concern
                return _unfollowed(trackers[i].request, error)

        moved = self.scheduler.advance(launched.plan, chosen.tokens, follow)
        if launched.plan.guesses:  # before anything reads a state, or copies one that was left
            self.runner.settle(launched.batch, settled_rows(launched.plan))
        for request in moved:
            if request.finish is not None:
                self._close(request)
                continue
            try:
                self.trackers[request].publish()
            except Exception as error:
                self.end(request, _unfollowed(request, error))
        busy = self._launched is not None
        plan, guesses = launched.plan, self.scheduler.guesses
        seconds = self.recorder.step_ended(launched.start, plan, self.generated, self.prompted, busy=busy)
        if guesses is not None and plan.decode:
            guesses.took(plan.tokens, seconds, ahead=bool(plan.sources))
            self.recorder.metrics.guesses(chosen.tokens, [len(c.guess) for c in plan.chunks])

    def _follow(self, tracker: Tracker, chosen: Chosen, i: int, j: int, version: str, now: float) -> Finish | None:
        """A request got the ``j``-th token of chunk ``i``; a ``Finish`` when its text or its grammar ends there."""
        self.generated += 1
        kept = tracker.logprobs
        if kept is not None:
            row = chosen.rows[i] + j
            kept.output.append(float(chosen.logprobs[row]))
            if chosen.top is not None:
                values, ids = (each[row, : kept.options.top].tolist() for each in chosen.top)
                kept.output_top.append(list(zip(values, ids, strict=True)))
        before = tracker.last_token
        found = tracker.take_token(version, now)
        self.recorder.token(tracker, before)
        return found

    # -- a step that failed -----------------------------------------------------------------------------------------

    def recover(self, error: Exception) -> None:
        """After a failed step: its requests end, the pools are made anew, and the others are computed again.

        Where nobody can say whose step it was, all end.
        """
        message = f"the step failed: {type(error).__name__}: {error}"
        planned, self._planned = self._planned, None
        self._launched = None  # it cannot have been computed
        alive = self.roster.of(None)
        of_it = alive if planned is None else [t for t in alive if t.request in planned.requests]
        self.end_all(of_it, Finish.abort("failed", message))
        self.scheduler.retract_all()
        # The buffers were donated to a step that did not give them back: what was on the device is lost.
        if "kv_cache" not in self.life.released:
            for pool in self.runner.pools.values():
                pool.free()
                pool.allocate()
        self.peers.forget_device()
        self.life.missed += forget_device(self.scheduler, self._mover)
        self.recorder.explainer.forgotten()
        self._stuck = False
        self._rested()
        self.places.look()
        if self.life.missed:
            self.learn()


def _unfollowed(request: Request, error: Exception) -> Finish:
    """The end of a request whose output cannot be made; called where ``error`` is handled."""
    log.exception("could not follow request %s", request.rid)
    return Finish.abort("failed", f"its output failed: {type(error).__name__}: {error}")
