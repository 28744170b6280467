"""From the engine's thread into an event loop: the newest output of each request, and one wake-up for many.

The engine's thread puts outputs down and goes on; it never waits for a reader. A reader that is slow finds, when it
comes back, one output for each of its requests: outputs are cumulative, so the newest says all that it missed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rootcellar.engine.output import Deliver, RequestOutput

log = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds of its own that the loop's thread spends on one reader's outputs before others on the loop get their turn.
_TURN = 0.001


class Post:
    """Carries outputs to one event loop. However many come before the loop looks, it is woken once.

    What would keep the loop too long has one thread: more would only keep the interpreter from the engine's own.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._on_the_way: deque[tuple[Mailbox, int, RequestOutput]] = deque()
        self._called = False
        self._thread = ThreadPoolExecutor(1, "rootcellar-aside")

    async def aside(self, work: Callable[[], T]) -> T:
        """Do ``work`` beside the loop, one thing after the other."""
        return await self.loop.run_in_executor(self._thread, work)

    def carry(self, mailbox: Mailbox, index: int, output: RequestOutput) -> None:
        """Bring an output to ``mailbox``; for the engine's thread."""
        self._on_the_way.append((mailbox, index, output))
        if not self._called:
            self._called = True
            try:
                self.loop.call_soon_threadsafe(self._hand_out)
            except RuntimeError:
                log.debug("an event loop closed before its request ended")

    def _hand_out(self) -> None:
        self._called = False  # before looking: what comes from here on calls again
        while self._on_the_way:
            mailbox, index, output = self._on_the_way.popleft()
            mailbox.put(index, output)


class Mailbox:
    """The outputs of one call's requests, for one reader on the event loop."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._newest: dict[int, RequestOutput] = {}
        self._reader: asyncio.Future[None] | None = None
        """What the reader waits for while nothing is there."""

    def deliver(self, index: int) -> Deliver:
        """What the engine calls with the outputs of request ``index``."""
        return lambda output: self._post.carry(self, index, output)

    def put(self, index: int, output: RequestOutput) -> None:
        """Replace what was there of request ``index``; it keeps its place in the order."""
        self._newest[index] = output
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def outputs(self, requests: int) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs as they come, the longest waiting first, until each of so many requests has ended.

        Others on the loop get their turn while many are there: neither they nor most of what is done with them waits.
        """
        began: float | None = time.thread_time()
        while requests:
            if not self._newest:
                self._reader = self._post.loop.create_future()
                await self._reader
                began = time.thread_time() if len(self._newest) > 1 else None  # the clock is dear
            elif began is None or time.thread_time() - began > _TURN:
                await asyncio.sleep(0)
                began = time.thread_time()
            index = next(iter(self._newest))
            output = self._newest.pop(index)
            requests -= output.finish is not None
            yield index, output
