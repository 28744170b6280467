"""The engine's thread: commands and steps, for as long as there is work.

One thread owns the scheduler, the cache and the pools. Others hand it commands to carry out, and functions that only
read, between two steps; so nothing here needs a lock. Commands find nothing under way, readers may find a step that was
begun ahead.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from rootcellar.engine.commands import Abandon, Command, Expire
from rootcellar.engine.step import Machine
from rootcellar.errors import EngineError

log = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds without a word from anybody after which the engine is idle: who asks several things in a row, as a check of
# health does, is held up once and not each time.
_QUIET = 0.1
# Seconds of commands between two steps, at most.
_PATIENCE = 0.02

# Seconds that the engine's thread has for ending when there is no going on.
_GRACE = 1.0

_OVER = "the engine was shut down"
_CLOSED = f"{_OVER}; make a new Engine"


class Loop:
    """Runs a machine on a thread of its own."""

    def __init__(self, machine: Machine) -> None:
        """Start the thread."""
        self.machine = machine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._abandoned: deque[int] = deque()
        """Calls whose callers went away: ended piece by piece, as nobody waits for that."""
        self._when_idle: deque[Callable[[], None]] = deque()
        self._stopped = threading.Event()
        self._closing = threading.Lock()
        self._closed = False
        self._why = _CLOSED
        """What those are told who come when it is over."""
        self._message = _OVER
        """What those are told whose requests it ends."""
        self._failed = False
        self._current: Future[Any] | None = None
        """Who waits for the command that is being carried out."""
        self._ended = threading.Lock()
        if machine.life.mover is not None:
            machine.life.mover.listen(self.wake)
        machine.peers.listen(self.wake)
        self._thread = threading.Thread(target=self._run, name="rootcellar-engine", daemon=True)
        self._thread.start()

    # -- from other threads ---------------------------------------------------------------------------------------

    def run(self, command: Command, *live: Any) -> Any:
        """Carry out ``command`` between two steps, and give its result or raise its error."""
        return self.wait(self.post(command, *live))

    def post(self, command: Command, *live: Any) -> Future[Any]:
        """:meth:`run` without waiting. Commands are carried out in the order in which they were given."""
        future: Future[Any] = Future()
        self._send(lambda: self._do(command, future, live))
        return future

    def abandon(self, call: int) -> None:
        """End a call whose caller went away. Does not wait; requests that ended already are left alone."""
        if not self._stopped.is_set():
            self._inbox.put(lambda: self._end_some(call))

    def call(self, function: Callable[[], T]) -> T:
        """Call a ``function`` that only reads between two steps, and give its result or raise its error."""
        return self.wait(self.ask(function))

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """:meth:`call` without waiting."""
        future: Future[T] = Future()
        self._send(lambda: _fill(future, function))
        return future

    def wait(self, future: Future[T]) -> T:
        """The result that was asked for, or its error; ``EngineError`` when the engine was shut down before."""
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():  # the function itself raised TimeoutError
                    raise
                if self._stopped.is_set() and (self._closed or not self._thread.is_alive()):
                    raise EngineError(self._message) from None

    def learn(self) -> None:
        """Let the machine take in what movers have seen by now."""
        self.call(self.machine.learn)

    def _send(self, function: Callable[[], None]) -> None:
        with self._closing:  # whatever is in the inbox before it closes is run: nobody is left without an answer
            if self._stopped.is_set() or self._closed:
                raise EngineError(self._why)
            self._inbox.put(function)

    def when_idle(self, function: Callable[[], None]) -> None:
        """Run ``function`` once, when nobody has wanted anything for a moment; for the engine's thread."""
        self._when_idle.append(function)

    def wake(self) -> None:
        """There is news for the machine to learn."""
        self._inbox.put(lambda: None)

    def stop(self) -> None:
        """Abort what is left and end the thread."""
        if not self._stopped.is_set():
            self._stopped.set()
            self.wake()
        if threading.current_thread() is not self._thread:
            while self._thread.is_alive() and not self._failed:  # that may come while it is waited for
                self._thread.join(_GRACE)
            self._thread.join(_GRACE)

    def await_end(self) -> str:
        """Wait until all is over; why it is."""
        self._stopped.wait()
        return self._message

    @property
    def failed(self) -> bool:
        """Whether there is no going on, also where it was to end anyway; what the devices were about may never end."""
        return self._failed

    def fail(self, why: str) -> None:
        """There is no going on: end all that is left with this reason, and refuse what comes. From any other thread.

        The engine's thread has a moment to do so itself; it may never return from the step that it is in.
        """
        self._over(why)
        self.stop()
        self._end_all()

    def _over(self, why: str) -> None:
        self._failed = True
        if not self._stopped.is_set():
            self._why = self._message = why
            self._stopped.set()

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def carry_out(self, command: Command) -> None:
        """Carry out ``command`` now, on the engine's thread, or raise its error."""
        done: Future[Any] = Future()
        self.machine.do(command, done)
        done.result()

    def _do(self, command: Command, future: Future[Any], live: tuple[Any, ...]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # an asyncio caller was cancelled meanwhile
        if self._stopped.is_set():
            future.set_exception(EngineError(self._why))
            return
        self._current = future
        try:
            self.machine.do(command, future, *live)
        except Exception as error:
            if not future.done():
                future.set_exception(EngineError(str(error)))
            raise
        finally:
            self._current = None

    def _run(self) -> None:
        machine = self.machine
        while not self._stopped.is_set():
            try:
                self._turn()
            except Exception as error:
                # A program that ends takes JAX's threads away before this one is told: nobody asked for that news.
                level = logging.ERROR if threading.main_thread().is_alive() else logging.DEBUG
                if not self._stopped.is_set():
                    log.log(level, "a step failed; its requests end with an error", exc_info=True)
                try:
                    machine.recover(error)
                except Exception as failure:  # what is left cannot be trusted: no more steps, nobody is left waiting
                    if not self._stopped.is_set():
                        log.log(level, "the engine could not recover and stops", exc_info=True)
                    self._over(f"{_OVER}: {failure}")
        self._end_all()

    def _turn(self) -> None:
        """Commands, news, and a step."""
        machine = self.machine
        quiet = not self._drain(wait=not (machine.ready or self._abandoned))
        self._end_abandoned()
        self._expire()
        if self._stopped.is_set():
            return
        machine.learn()
        if machine.ready:
            machine.step()
        elif quiet and self._may_idle:
            self._when_idle.popleft()()

    def _end_all(self) -> None:
        """Nobody is left waiting; once."""
        if not self._ended.acquire(blocking=False):
            return
        for tracker in self.machine.roster.of(None):
            tracker.fail("shutdown", self._message)
        self.machine.trackers.clear()
        with self._closing:
            self._closed = True
        self._drain(wait=False)
        if (left := self._current) is not None and not left.done():
            left.set_exception(EngineError(self._message))

    def _end_abandoned(self) -> None:
        if self._abandoned:
            self._end_some(self._abandoned.popleft())

    def _end_some(self, call: int) -> None:
        if self._stopped.is_set():
            return  # all end
        left = Future[bool]()
        self.machine.do(Abandon(call), left)
        if left.result():  # the others when whoever came meanwhile had a turn
            self._abandoned.append(call)

    @property
    def _may_idle(self) -> bool:
        """Whether there is something to do while nobody wants anything."""
        return bool(self._when_idle) and self.machine.able and self.machine.scheduler.idle

    def _drain(self, *, wait: bool) -> bool:
        """Run what other threads asked for; whether there was anything.

        With ``wait``, sleep until there is something or an alarm goes. However much they ask for, a step that can be
        computed is, before long.
        """
        now, ran, until = self.machine.clock.now, False, 0.0
        while not ran or now() < until or self._stopped.is_set():
            try:
                function = self._inbox.get(block=wait, timeout=self._alarm() if wait else None)
            except queue.Empty:
                return ran
            if not ran:
                until = now() + _PATIENCE
            self._expire()  # what is late by now has ended before anything that came after
            function()
            ran, wait = True, False
        return ran

    def _alarm(self) -> float | None:
        """Seconds until something is late, or until an engine that nobody asks is idle; None: never."""
        late = self.machine.next_end
        waits = [] if late is None else [max(0.0, late - self.machine.clock.now())]
        return min(waits + [_QUIET] * self._may_idle, default=None)

    def _expire(self) -> None:
        if self._stopped.is_set():
            return  # all end, perhaps on another thread
        late = self.machine.next_end
        if late is not None and late <= (now := self.machine.clock.now()):
            self.machine.do(Expire(now, self.machine.recorder.demand.longest), Future())


def _fill(future: Future[T], function: Callable[[], T]) -> None:
    """Leave the result or the error of ``function`` in ``future``."""
    if not future.set_running_or_notify_cancel():
        return  # an asyncio caller was cancelled meanwhile
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
