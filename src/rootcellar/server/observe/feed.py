"""The live feed: what the page draws, as server-sent events.

One task reads the engine for all watchers, and only while there are any. A watcher gets the newest of each event and
never a backlog: a slow one misses some and slows nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson

import rootcellar
from rootcellar.engine.sight import Reading, Sight
from rootcellar.errors import EngineError

log = logging.getLogger(__name__)

INTERVAL = 1.0
# Looking at the tree and at every page takes the engine's time: at most this part of it.
LOOKING = 0.01
NODES = 160
HEARTBEAT = 15.0


class Feed:
    """Events for any number of watchers up to ``max_watchers``."""

    def __init__(
        self,
        sight: Sight,
        read: Callable[[], Awaitable[Reading]],
        model_name: str,
        tenant: str | None = None,
        max_watchers: int = 32,
    ) -> None:
        """``read`` gives the numbers; ``tenant``: whose cache is shown (None: all)."""
        self._sight = sight
        self._tenant = tenant
        self._model_name = model_name
        self._read = read
        self._max_watchers = max_watchers
        self._watchers = 0
        self._newest: dict[str, tuple[int, bytes]] = {}
        self._number = 0
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether one more watcher must be refused."""
        return self._closed or self._watchers >= self._max_watchers

    async def close(self) -> None:
        """End every watcher's stream; the server is about to stop."""
        self._closed = True
        async with self._changed:
            self._changed.notify_all()

    async def watch(self) -> AsyncIterator[bytes]:
        """The last minutes, then events as they come, from the newest of each on; ends with :meth:`close`."""
        self._watchers += 1
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._produce())
            yield b"retry: 2000\n\n" + await self._history()
            seen = 0
            while not self._closed:
                async with self._changed:
                    try:
                        await asyncio.wait_for(
                            self._changed.wait_for(lambda seen=seen: self._closed or self._number > seen), HEARTBEAT
                        )
                    except TimeoutError:
                        yield b": still here\n\n"
                        continue
                    fresh = [event for number, event in self._newest.values() if number > seen]
                    seen = self._number
                yield b"".join(fresh)
        finally:
            self._watchers -= 1

    async def _history(self) -> bytes:
        """The minutes before, for a watcher that has just come; none when the engine cannot say."""
        try:
            samples = await asyncio.to_thread(self._sight.history, self._tenant)
        except EngineError:
            return b""
        return _event("history", samples)

    async def _produce(self) -> None:
        look_at = 0.0
        while self._watchers and not self._closed:
            try:
                await self._publish("numbers", numbers(await self._read(), self._model_name))
                if time.monotonic() >= look_at:
                    look = await asyncio.to_thread(self._sight.look, NODES, tenant=self._tenant)
                    look_at = time.monotonic() + max(2 * INTERVAL, look["seconds"] / LOOKING)
                    await self._publish("cache", look)
            except EngineError as error:
                await self._publish("trouble", {"message": str(error)})
            except Exception as error:  # the next try may do better; watchers must not be left without a word
                log.exception("the feed failed")
                await self._publish("trouble", {"message": f"{type(error).__name__}: {error}"})
            await asyncio.sleep(INTERVAL)
        self._newest.clear()

    async def _publish(self, event: str, data: dict[str, Any]) -> None:
        async with self._changed:
            self._number += 1
            self._newest[event] = self._number, _event(event, data)
            self._changed.notify_all()


def _event(name: str, data: object) -> bytes:
    """A server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))


def numbers(reading: Reading, model_name: str) -> dict[str, Any]:
    """What changes all the time, of one reading."""
    first, gaps = (
        reading.distributions[name][0][1] for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")
    )
    return {
        "model": model_name,
        "version": rootcellar.__version__,
        "at": reading.at,
        "stats": reading.stats,
        "requests": reading.requests,
        "latency": {
            name: {"count": d.count, "sum": d.sum} for name, d in (("first_token", first), ("inter_token", gaps))
        },
    }
