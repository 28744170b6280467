"""From a request to the engine and back: whole answers and streams, each given up when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar, cast

import orjson
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rootcellar.server.callers import caller_of
from rootcellar.server.errors import ApiError, api_error, ended_early
from rootcellar.server.pace import paced
from rootcellar.server.state import ServerState

T = TypeVar("T")
Result = dict[str, Any]

DONE = b"data: [DONE]\n\n"
_CLIENT_WENT_AWAY = 499  # nginx's number; nobody reads it


async def whole(request: Request, state: ServerState, **arguments: Any) -> list[Result]:
    """Every result of ``Engine.generate(**arguments)``, in order. Aborts when the client goes away.

    What is computed for a request is its caller's, unless ``tenant`` is among the arguments.
    """
    arguments.setdefault("tenant", caller_of(request).name)
    async with elsewhere(request, state, arguments) as asked:
        results = await unless_gone(request, state.engine.async_generate(raise_on_failure=False, **asked))
    return [counts(result) for result in (results if isinstance(results, list) else [cast(Result, results)])]


def elsewhere(
    request: Request, state: ServerState, arguments: dict[str, Any]
) -> contextlib.AbstractAsyncContextManager[dict[str, Any]]:
    """``arguments``, whose prompts another server computes meanwhile where there is one for that."""
    if state.prefill is None:
        return contextlib.nullcontext(arguments)
    return state.prefill.asked(request, arguments)


def require_room(request: Request, state: ServerState, prompts: object, n: int) -> None:
    """Refuse ``n`` answers to each of these prompts before they are read, where the caller's queue is known to be full.

    ``prompts``: one, as text or as a list of token ids, or a list of either.
    """
    several = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], str | list)
    count = len(prompts) if several else 1  # type: ignore[arg-type]
    state.engine.require_room(count * n, caller_of(request).name)


class Stream:
    """The growing results of one call, of which the first is there. Close it, or its requests run to their end."""

    def __init__(self, first: Result, rest: AsyncGenerator[Result], beside: contextlib.AsyncExitStack) -> None:
        """``beside``: what goes on as long as the stream does."""
        self._first = first
        self._rest = rest
        self._beside = beside

    async def results(self) -> AsyncGenerator[Result]:
        """All of them; raises when one of the requests ends with an error."""
        yield counts(self._first)
        async for result in self._rest:
            yield counts(result)

    async def aclose(self) -> None:
        """Abort what still runs."""
        async with self._beside:
            await self._rest.aclose()


async def begin(request: Request, state: ServerState, **arguments: Any) -> Stream:
    """The growing results of ``Engine.generate(**arguments)``, from the first one on.

    What fails before that is an error of the whole answer, with a status of its own.
    """

    arguments.setdefault("tenant", caller_of(request).name)

    async def first() -> Stream:
        async with contextlib.AsyncExitStack() as stack:
            asked = await stack.enter_async_context(elsewhere(request, state, arguments))
            options = {"stream": True, "raise_on_failure": False, **asked}
            results = cast(AsyncGenerator[Result], await state.engine.async_generate(**options))
            return Stream(counts(await anext(results)), results, stack.pop_all())

    return await unless_gone(request, first())


def counts(result: Result) -> Result:
    """``result``, unless it ended with an error: that is raised."""
    finish = result["meta_info"]["finish_reason"]
    error = None if finish is None else ended_early(finish)
    if error is not None:
        raise error
    return result


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` and give its result; when the client goes away first, cancel it."""
    task = asyncio.ensure_future(paced(work))
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(_CLIENT_WENT_AWAY, "the client went away")
    finally:
        await _end(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(BaseException):
            await task


def _failed(error: ApiError) -> bytes:
    return event_of(error.body())


class EventStream(Response):
    """Server-sent events. What raises in the middle becomes an event, and the stream still ends as it should."""

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: Stream,
        events: AsyncGenerator[bytes],
        *,
        failed: Callable[[ApiError], bytes] = _failed,
        end: bytes = DONE,
    ) -> None:
        """Send ``events``, whole ``data: ...`` blocks made from ``stream``, then ``end``.

        ``failed``: the event that tells of an error.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._events = events
        self._failed = failed
        self._end = end

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send, until the end or until the client goes away."""
        pump = asyncio.ensure_future(paced(self._pump(send)))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            await _end(pump, gone)
            await self._events.aclose()
            await self._stream.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": self._failed(api_error(error)), "more_body": True})
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


def event_of(content: object) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS) + b"\n\n"


def named_event(content: dict[str, Any]) -> bytes:
    """One event that is called after its ``type``."""
    return b"event: " + content["type"].encode() + b"\n" + event_of(content)


async def on_thread(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Run what waits for the engine beside the event loop."""
    return await asyncio.to_thread(function, *arguments, **named)
