"""Threads that are kept for the next call: to start one takes 0.4 ms, and libraries begin anew on each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_Tasks = queue.SimpleQueue["tuple[Callable[[], None], Callable[[], None]] | None"]


class Threads:
    """As many as are at work at once, called ``name``, and they end with the process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._idle: list[tuple[threading.Thread, _Tasks]] = []
        self._closed = False

    def run(self, work: Callable[[], None], after: Callable[[], None]) -> None:
        """Call ``work``, then ``after``, on a thread that others do not wait for. Neither may raise.

        Whoever hears of its end by ``after`` finds the thread at leisure: that must be over soon.
        """
        with self._lock:
            tasks = self._idle.pop()[1] if self._idle else None
        if tasks is None:
            tasks = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(tasks,), name=self._name, daemon=True).start()
        tasks.put((work, after))

    def close(self) -> None:
        """End those that do nothing; others end when their work does."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for thread, tasks in idle:
            tasks.put(None)
            thread.join()

    def _serve(self, tasks: _Tasks) -> None:
        while (item := tasks.get()) is not None:
            work, after = item
            work()
            with self._lock:
                if not self._closed:
                    self._idle.append((threading.current_thread(), tasks))
                last = self._closed
            after()
            del item, work, after  # and what they hold
            if last:
                return
