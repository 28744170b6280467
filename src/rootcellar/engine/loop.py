"""The engine's thread: schedule, run, deliver, for as long as there is work.

One thread owns the scheduler, the cache and the pools. Others hand it functions to call between two steps; so nothing
here needs a lock, and a command sees the engine at rest.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from jax import Array

from rootcellar.engine.lifecycle import Lifecycle
from rootcellar.engine.output import Tracker
from rootcellar.engine.recorder import Recorder
from rootcellar.engine.roster import Roster
from rootcellar.errors import ConfigError, EngineError, QueueFull, RequestTooLarge
from rootcellar.runner import Batch, Part
from rootcellar.runner.sampler import Sampled
from rootcellar.scheduler import Chunk, Finish, Plan, Request

log = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds without a word from anybody after which the engine is idle: who asks several things in a row, as a check of
# health does, is held up once and not each time.
_QUIET = 0.1
# Requests of one call that are ended in one go.
_SLICE = 32
# Seconds of commands between two steps, at most.
_PATIENCE = 0.02

MODES = ("wait", "abort", "retract")


class Loop:
    """Runs steps on a thread of its own.

    Attributes:
        roster, trackers: the requests that have not ended.
        steps, generated, prompted: steps run, tokens chosen, prompt tokens computed, since the start.
        recorder: what was counted, and what happened lately; for the engine's thread.
    """

    def __init__(self, life: Lifecycle, max_running: int, max_queued: int | None, log_interval: float) -> None:
        """Start the thread. ``max_running`` requests run and ``max_queued`` (None: any number) wait.

        ``log_interval``: seconds between two lines of the log about the work under way.
        """
        self.life = life
        self._max_running = max_running
        self._max_queued = max_queued
        self.scheduler = life.scheduler
        self.recorder = Recorder(life.scheduler, log_interval)
        self.runner = life.runner
        self.paused = False
        self.roster = Roster()
        self.trackers = self.roster.trackers
        self.steps = self.generated = self.prompted = 0
        self._at_rest: deque[Callable[[], None]] = deque()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._when_idle: deque[Callable[[], None]] = deque()
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._stopped = threading.Event()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rootcellar-engine", daemon=True)
        self._thread.start()

    # -- from other threads ---------------------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the engine's thread between two steps, and give its result or raise its error."""
        return self.wait(self.ask(function))

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """:meth:`call` without waiting: the future has the result or the error."""
        future: Future[T] = Future()
        self._send(_filling(future, function))
        return future

    def call_at_rest(self, function: Callable[[], T], mode: str) -> T:
        """Run ``function`` when no request runs. ``mode``: what becomes of those that do.

        ``"wait"``: they end first, and waiting ones go on waiting; ``"retract"``: they wait again, with what they have;
        ``"abort"``: they and all waiting ones end.
        """
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r} is unknown: choose from {', '.join(MODES)}")
        future: Future[T] = Future()
        run = _filling(future, function)
        self._send(lambda: self._come_to_rest(mode, run, future.set_exception))
        return self.wait(future)

    def wait(self, future: Future[T]) -> T:
        """The result of a command, or its error; ``EngineError`` when the engine was shut down before it ran."""
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():  # the function itself raised TimeoutError
                    raise
                if self._stopped.is_set() and not self._thread.is_alive():
                    raise EngineError("the engine was shut down") from None

    def _send(self, function: Callable[[], None]) -> None:
        with self._closing:  # whatever is in the inbox before it closes is run: no command is left without an answer
            if self._stopped.is_set() or self._closed:
                raise EngineError("the engine was shut down; make a new Engine")
            self._inbox.put(function)

    def submit(self, trackers: list[Tracker]) -> Future[None]:
        """Add requests, all of them in one step or none. Does not wait: the future has the error, if any.

        Commands run in the order in which they were given, so an :meth:`abandon` after this finds the requests.
        """
        future: Future[None] = Future()
        self._send(_filling(future, lambda: self._submit(trackers)))
        return future

    def abandon(self, trackers: list[Tracker]) -> None:
        """End requests whose caller went away. Does not wait; those that ended already are left alone."""

        def abandon(first: int = 0) -> None:
            for tracker in trackers[first : first + _SLICE]:
                if tracker.request in self.trackers:
                    self._end(tracker.request, Finish.abort("asked", "the caller went away"))
            if first + _SLICE < len(trackers):  # the others of a large call, when whoever came meanwhile had a turn
                self._inbox.put(lambda: abandon(first + _SLICE))

        if not self._stopped.is_set():
            self._inbox.put(abandon)

    def abort(self, rid: str, tenant: str | None, message: str) -> int:
        """End what goes by the name ``rid``, of a tenant or (None) of all; returns how many requests that were."""

        def end() -> int:
            named = self.roster.named(rid, tenant)
            for tracker in named:
                self._end(tracker.request, Finish.abort("asked", message))
            return len(named)

        return self.call(end)

    def abort_all(self, message: str, cause: str) -> int:
        """End every request; returns how many."""

        def end() -> int:
            requests = [t.request for t in self.trackers.values()]
            for request in requests:
                self._end(request, Finish.abort(cause, message))
            return len(requests)

        return self.call(end)

    def at(self, moment: float, function: Callable[[], None]) -> None:
        """Run ``function`` between two steps, once ``time.perf_counter()`` is ``moment``; for the engine's thread."""
        heapq.heappush(self._alarms, (moment, next(self._serial), function))

    def when_idle(self, function: Callable[[], None]) -> None:
        """Run ``function`` once, when nobody has wanted anything for a moment; for the engine's thread."""
        self._when_idle.append(function)

    def stop(self) -> None:
        """Abort what is left and end the thread."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Forget every cached prefix. See ``Engine.flush_cache``."""
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        # While nothing is computed, waiting requests hold no memory: flushing is safe, and wanted between rollouts.
        if running or (waiting and not (self.paused or self.life.released)):
            raise EngineError(
                f"flush_cache refused: {running} requests run and {waiting} wait; let them end or abort them first"
            )
        self.life.flush()

    def _come_to_rest(self, mode: str, then: Callable[[], None], fail: Callable[[Exception], None]) -> None:
        if mode == "abort":
            for request in [t.request for t in self.trackers.values()]:
                self._end(request, Finish.abort("asked", "aborted to bring the engine to rest"))
        elif mode == "retract":
            self.scheduler.retract_all()
        if not self.scheduler.running:
            then()
        elif self.paused:
            n = len(self.scheduler.running)
            fail(EngineError(f"{n} requests run and generation is paused: continue it, or use mode abort or retract"))
        else:
            self.scheduler.admitting = False
            self._at_rest.append(then)

    def _rested(self) -> None:
        """Do what waited for the last running request to end."""
        if not self.scheduler.running and self._at_rest:
            while self._at_rest:
                self._at_rest.popleft()()
            self.scheduler.admitting = True

    def _submit(self, trackers: list[Tracker]) -> None:
        if self._stopped.is_set():
            raise EngineError("the engine was shut down; make a new Engine")
        self.life.require_memory()
        self._require_room(trackers[0].request.tenant if trackers else "", len(trackers))
        self.roster.add(trackers)
        for tracker in trackers:
            self.scheduler.add(tracker.request)

    def _require_room(self, tenant: str, new: int) -> None:
        """The queue has a limit for each tenant, of which one call takes three quarters at most."""
        if self._max_queued is None:
            return
        free = max(0, self._max_running - len(self.scheduler.running))
        if new > self._max_queued + self._max_running:
            raise RequestTooLarge(
                f"{new} sequences in one request; no more than {self._max_queued + self._max_running} can ever run and "
                "wait: send fewer, or raise max_queued_requests"
            )
        waiting = self.scheduler.waiting.places(tenant, self._max_queued - self._max_queued // 4 + free)
        if waiting + new > self._max_queued + free:
            raise QueueFull(
                f"too many requests: {waiting} wait and max_queued_requests is {self._max_queued}; "
                "try again later or raise it"
            )

    def _end(self, request: Request, finish: Finish) -> None:
        self.scheduler.finish(request, finish)
        self._close(request)

    def _close(self, request: Request) -> None:
        tracker = self.roster.remove(request)
        tracker.note_stage()
        self.recorder.request_ended(tracker)
        try:
            tracker.close()
        except Exception as error:  # neither stops the others nor leaves its caller waiting
            log.exception("could not make the end of request %s", request.rid)
            tracker.fail("failed", f"its output could not be made: {type(error).__name__}: {error}")

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                runnable = not (self.scheduler.idle or self.paused or self.life.released)
                quiet = not self._drain(wait=not runnable)
                self._expire()
                if runnable and self._able:
                    self._step()
                elif quiet and self.scheduler.idle and self._when_idle and self._able:
                    self._when_idle.popleft()()
                self._rested()
            except Exception as error:
                # A program that ends takes JAX's threads away before this one is told: nobody asked for that news.
                level = logging.ERROR if threading.main_thread().is_alive() else logging.DEBUG
                log.log(level, "a step failed; its requests end with an error", exc_info=True)
                try:
                    self._recover(error)
                except Exception:  # what is left cannot be trusted: no more steps, and nobody is left waiting
                    log.log(level, "the engine could not recover and stops", exc_info=True)
                    self._stopped.set()
        for tracker in list(self.trackers.values()):
            tracker.fail("shutdown", "the engine was shut down")
        self.trackers.clear()
        with self._closing:
            self._closed = True
        self._drain(wait=False)

    @property
    def _able(self) -> bool:
        """Whether anything may be computed now."""
        return not (self._stopped.is_set() or self.paused or self.life.released)

    def _drain(self, *, wait: bool) -> bool:
        """Run what other threads asked for; whether there was anything.

        With ``wait``, sleep until there is something or a deadline passes. However much they ask for, a step that can
        be computed is, before long.
        """
        ran, until = False, 0.0
        while not ran or time.perf_counter() < until or self._stopped.is_set():
            try:
                command = self._inbox.get(block=wait, timeout=self._next_deadline() if wait else None)
            except queue.Empty:
                return ran
            if command is None:
                return True
            if not ran:
                until = time.perf_counter() + _PATIENCE
            command()
            ran, wait = True, False
        return ran

    def _next_deadline(self) -> float | None:
        # All have the same time, so the oldest is the first to be late.
        first = next(iter(self.trackers.values()), None)
        deadlines = [first.deadline] if first is not None and first.deadline is not None else []
        if self._alarms:
            deadlines.append(self._alarms[0][0])
        if self._when_idle and self._able:
            deadlines.append(time.perf_counter() + _QUIET)
        return max(0.0, min(deadlines) - time.perf_counter()) if deadlines else None

    def _expire(self) -> None:
        now = time.perf_counter()
        while self._alarms and self._alarms[0][0] <= now:
            heapq.heappop(self._alarms)[2]()
        late = itertools.takewhile(lambda t: t.deadline is not None and now > t.deadline, self.trackers.values())
        for tracker in list(late):
            self._end(tracker.request, Finish.abort("timeout", "timed out: it took longer than request_timeout"))

    def _step(self) -> None:
        self.recorder.step_begins()
        plan = self.scheduler.plan()
        self.recorder.planned(self.trackers)
        for request in self.scheduler.failed:
            self._close(request)
        self.scheduler.failed.clear()
        if plan is None:
            self._unblock()
            return
        for chunk in plan.chunks:
            self.trackers[chunk.request].note_stage()
        tokens = self._compute(plan)
        self.recorder.computed()
        self.steps += 1
        for request in self.scheduler.advance(plan, tokens):
            try:
                self._deliver(request)
            except Exception as error:  # one request's output is no other's concern
                log.exception("could not follow request %s", request.rid)
                self._end(request, Finish.abort("failed", f"its output failed: {type(error).__name__}: {error}"))
        self.recorder.step_ended(plan, self.generated, self.prompted)

    def _unblock(self) -> None:
        """Nothing can be computed although something waits: end the first with the reason rather than hang."""
        if not self.scheduler.idle and not self.scheduler.running:
            request = next(iter(self.scheduler.waiting))
            available = self.scheduler.cache.available_tokens()
            self._end(request, Finish.abort("no_room", f"cannot start: {available} tokens of KV cache are available"))

    def _compute(self, plan: Plan) -> np.ndarray:
        """Run the step; the chosen token for each chunk (0 where a chunk gives none)."""
        cache, runner = self.scheduler.cache, self.runner
        parts = [Part(_row(c.request), c.start, c.request.ids[c.start : c.stop]) for c in plan.chunks]
        tables = {kind.name: cache.tables[kind.name] for kind in cache.kinds}
        batch = Batch.build(parts, tables, 1 if plan.decode else runner.shapes.tile)
        self.recorder.dispatched()
        scores, hidden = runner.step(batch)
        self._score_prompts(plan, batch, hidden)
        if not plan.decode:
            self.prompted += sum(c.stop - c.start for c in plan.chunks)
        if not any(c.ends for c in plan.chunks):
            return np.zeros(len(plan.chunks), np.int32)
        rows = [self._sampled(c) for c in plan.chunks]
        tokens, logprobs = runner.sample(scores, rows)
        self._keep_logprobs(plan, scores, logprobs)
        return tokens[: len(plan.chunks)]

    def _sampled(self, chunk: Chunk) -> Sampled:
        request, tracker = chunk.request, self.trackers[chunk.request]
        grammar = tracker.grammar if chunk.ends else None
        return Sampled(
            request.sampling,
            tracker.seed,
            chunk.stop,
            request.banned if grammar is None else (),  # a grammar alone says where its answer may end
            request.ids[: request.prompt_length],
            request.output,
            None if grammar is None else grammar.allowed(),
        )

    def _keep_logprobs(self, plan: Plan, scores: Array, logprobs: np.ndarray) -> None:
        wanted = [
            (i, kept)
            for i, c in enumerate(plan.chunks)
            if c.ends and c.request.sampling.max_new_tokens and (kept := self.trackers[c.request].logprobs) is not None
        ]
        k = max((kept.options.top for _, kept in wanted), default=0)
        values, ids = self.runner.top_logprobs(scores, k) if k else (None, None)
        for i, kept in wanted:
            kept.output.append(float(logprobs[i]))
            if values is not None and ids is not None:
                n = kept.options.top
                kept.output_top.append(list(zip(values[i, :n].tolist(), ids[i, :n].tolist(), strict=True)))

    def _score_prompts(self, plan: Plan, batch: Batch, hidden: Array) -> None:
        """Logprobs of prompt tokens: the state at position p says how likely the token at p + 1 was."""
        if all(c.request.score_from is None for c in plan.chunks):
            return
        targets = np.zeros(len(batch.tokens), np.int32)
        spans = []
        for chunk, at in zip(plan.chunks, batch.starts, strict=True):
            request = chunk.request
            kept = self.trackers[request].logprobs
            if request.score_from is None or kept is None or kept.options.start is None:
                continue
            stop = min(chunk.stop, request.prompt_length - 1)
            n = max(0, stop - chunk.start)
            targets[at : at + n] = request.ids[chunk.start + 1 : chunk.start + 1 + n]
            spans.append((chunk.start, n, at, kept))
        k = max((kept.options.top for *_, kept in spans), default=0)
        chosen, values, ids = self.runner.score(hidden, targets, k)
        for start, n, at, kept in spans:
            kept.prompt[start + 1 : start + 1 + n] = chosen[at : at + n]
            top = kept.options.top
            if top:
                kept.prompt_top[start + 1 : start + 1 + n] = values[at : at + n, :top]
                kept.prompt_top_ids[start + 1 : start + 1 + n] = ids[at : at + n, :top]

    def _deliver(self, request: Request) -> None:
        """Follow a request's newest token: to its caller, or to its end."""
        tracker = self.trackers[request]
        if request.generated:
            self.generated += 1
            before = tracker.last_token
            found = tracker.take_token(self.life.version)
            self.recorder.token(tracker, before)
            if found is not None and request.finish is None:
                self._end(request, found)
                return
        if request.finish is not None:
            self._close(request)
        else:
            tracker.publish()

    def _recover(self, error: Exception) -> None:
        """After a failed step: its requests end, the pools are made anew, and the engine goes on."""
        message = f"the step failed: {type(error).__name__}: {error}"
        for request in [t.request for t in self.trackers.values()]:
            self._end(request, Finish.abort("failed", message))
        # The buffers were donated to a step that did not give them back, so nothing cached can be trusted.
        self.scheduler.cache.flush()
        if "kv_cache" not in self.life.released:
            for pool in self.runner.pools.values():
                pool.free()
                pool.allocate()
        self._rested()


def _filling(future: Future[T], function: Callable[[], T]) -> Callable[[], None]:
    """``function`` as a command that leaves its result or its error in ``future``."""

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return  # an asyncio caller was cancelled meanwhile
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    return run


def _row(request: Request) -> int:
    assert request.lease is not None
    return request.lease.row
