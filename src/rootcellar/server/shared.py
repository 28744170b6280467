"""Work that many callers want the result of at the same time, and that is done once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Callers that come while the work is under way, or ``seconds`` after it succeeded, get its result.

    An error is for those who waited for it: the next caller tries again. A caller that goes away stops nothing.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> None:
        self._work = work
        self._seconds = seconds
        self._task: asyncio.Task[T] | None = None
        self._until = 0.0

    async def result(self) -> T:
        """What the work gives, now or lately; raises what it raised."""
        if self._task is None or (self._task.done() and asyncio.get_running_loop().time() >= self._until):
            self._until = 0.0
            self._task = asyncio.create_task(self._fresh())
        return await asyncio.shield(self._task)

    async def _fresh(self) -> T:
        result = await self._work()
        # Before anybody can see that the task is done: whoever came then would start the work again.
        self._until = asyncio.get_running_loop().time() + self._seconds
        return result
