"""Follows the engine's loop: what it counts, what it remembers, what it logs of requests and steps.

The loop says what happened; everything here runs on its thread, and costs a step some microseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from rootcellar.cache import Key
from rootcellar.engine.clock import Clock
from rootcellar.engine.explaining import Explainer
from rootcellar.engine.history import History
from rootcellar.engine.metrics import Counts, Metrics
from rootcellar.engine.output import Tracker
from rootcellar.engine.rates import Demand, Meter
from rootcellar.engine.spending import Spending
from rootcellar.engine.stats_logger import StatsLogger
from rootcellar.engine.timeline import RequestRecord, StepRecord, Timeline
from rootcellar.engine.trace_log import TraceLine, TraceLog
from rootcellar.runner import Runner
from rootcellar.scheduler import Plan, Request, Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """When a step began to be planned, and when the device got it."""

    began: float
    dispatched: float


class Recorder:
    """What is known of one engine's past.

    Attributes:
        began: when the engine did, by the clock.
        metrics, timeline, history: what was counted, what happened lately, and the last minutes in samples.
        explainer: why requests computed what they did.
        meter: how fast prompts were computed, and bytes came from farther tiers.
        demand: how much the cache's room is in demand.
        spending: what steps of prefill took, and whose prompts.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        log_interval: float,
        clock: Clock,
        total_tokens: int,
        trace: TraceLog | None = None,
    ) -> None:
        """``log_interval``: seconds between two lines of the log about the work under way. ``trace``: told of all.

        ``total_tokens``: what the cache holds.
        """
        self._now = clock.now
        self.began = self._now()
        self.metrics = Metrics(self.began)
        self.timeline = Timeline()
        self.meter = Meter()
        self.demand = Demand(total_tokens)
        self.spending = Spending(runner.shapes)
        self.explainer = Explainer(scheduler.cache.page_size)
        self.history = History(scheduler, runner, self.metrics, self.began)
        self._scheduler = scheduler
        self._trace = trace
        self._stats_logger = StatsLogger(log_interval, self.began)
        self._planning = self._computed_before = self._computed = self._ended = self.began

    def step_begins(self) -> None:
        """The scheduler is about to plan."""
        self._planning = self._now()

    def planned(self, trackers: Mapping[Request, Tracker]) -> None:
        """The scheduler planned: requests may have been retracted, and entries evicted."""
        cache = self._scheduler.cache
        self.metrics.cache_moved_on(cache.tick, cache.take_evictions(), self._planning)
        for request in self._scheduler.retracted:
            tracker = trackers.get(request)
            if tracker is not None and tracker.note_stage():
                log.info("request %s was retracted and waits again; it has %d tokens", request.rid, request.length)
        self._scheduler.retracted.clear()

    def dispatched(self) -> Start:
        """The batch that was planned last is built and goes to the device."""
        return Start(self._planning, self._now())

    def computed(self, start: Start, plan: Plan, trackers: Mapping[Request, Tracker]) -> None:
        """The tokens of ``plan``, the oldest step under way, which began so, are there."""
        self._computed_before, self._computed = self._computed, self._now()
        self.spending.step(plan, self._computed - max(start.began, self._ended), trackers)

    def token(self, tracker: Tracker, before: float | None) -> None:
        """A request got a token; ``before``: when it got the one before, None for the first."""
        assert tracker.last_token is not None
        request = tracker.request
        if before is None:
            self._explain(tracker)
        for counts in self._counts(request):
            if before is not None:
                counts.next_token(tracker.last_token - before)
                continue
            counts.first_token(
                tracker.last_token - tracker.received,
                (tracker.started or tracker.queued) - tracker.queued,
                request.prompt_length,
                request.cached or 0,
            )

    def _explain(self, tracker: Tracker, known: int | None = None) -> None:
        gone = tracker.request.met.evicted
        evicted_at = None if gone is None else self.metrics.ticks.at(gone.tick)
        tick, now, request = self._scheduler.cache.tick, self._now(), tracker.request
        if request.cached is not None:
            age = None if evicted_at is None else now - evicted_at
            self.demand.note(request.prompt_length - request.cached, age, now)
        self.explainer.begun(tracker, now, self.spending.cost, evicted_at, tick, known)

    def _counts(self, request: Request) -> tuple[Counts, ...]:
        """Where a request counts: with all, and with those of its tenant, if that has a name."""
        metrics = self.metrics
        return (metrics.all, metrics.of(request.tenant)) if request.tenant else (metrics.all,)

    def step_ended(self, start: Start, plan: Plan, generated: int, prompted: int, *, busy: bool) -> float:
        """All of the step that began so is followed up; how long it lasted.

        A step that was planned while another ran lasts from that one's end, so that no time counts twice; the device
        began with it when it was done with that one. ``generated`` and ``prompted``: tokens since the engine began.
        ``busy``: whether the device had the next step already.
        """
        now = self._now()
        began, dispatched = max(start.began, self._ended), max(start.dispatched, self._computed_before)
        self._ended = now
        tokens = plan.tokens
        self.timeline.steps.append(
            StepRecord(
                began, dispatched, self._computed, now, "decode" if plan.decode else "prefill", len(plan.chunks), tokens
            )
        )
        with_device = (now if busy else self._computed) - max(dispatched, began)
        self.metrics.step(plan.decode, now - began, with_device)
        self.meter.prefills.step(0 if plan.decode else tokens, now - began, ended=any(c.ends for c in plan.chunks))
        self.history.step_ended(generated, now)
        self._stats_logger.step_ended(self._scheduler, generated, prompted, began, now)
        return now - began

    def encoded(self) -> None:
        """It was the encoder's turn instead, which is over: everybody waited for it as for a step."""
        self._ended = now = self._now()
        self.timeline.steps.append(StepRecord(self._planning, self._planning, now, now, "encode", 0, 0))

    def request_ended(self, tracker: Tracker) -> None:
        """A request came to its end."""
        request, finish = tracker.request, tracker.request.finish
        assert finish is not None
        if tracker.first_token is None:
            # Of a prompt that was given up no more was ever there than the tree knows now.
            cut = finish.type == "abort" and request.cached is not None
            key = request.key(request.prompt_length)
            self._explain(tracker, self._scheduler.cache.match(key).branch if cut else None)
        record = RequestRecord.of(tracker, end=tracker.stages[-1][1])
        for counts in self._counts(request):
            counts.ended(finish.type, tracker.stages[-1][1] - tracker.received, record.stages)
        # A copy: the request's own array has room for all that it might have generated.
        key = request.key(request.length)
        tokens = key.tokens.copy()
        key = Key(tokens, key.namespace)
        self.timeline.ended(record, key)
        if tracker.first_token is not None:
            kept = key[: request.length - 1]  # the newest token is not computed
            known = kept if finish.type != "abort" else key[: self._scheduler.cache.match(kept).branch]
            self.explainer.ended(tracker, known, self._scheduler.cache.tick)
        if self._trace is not None and tracker.started is not None:
            at = tracker.started - self.began
            self._trace.ended(TraceLine(at, tokens, request.prompt_length, request.namespace))
        if finish.type == "abort" and finish.cause != "gone":
            log.info("request %s ended early: %s", request.rid, finish.message)
        log.debug("request %s ended: %s", request.rid, record)
