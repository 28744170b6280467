"""What an operator or a trainer asks for: flush, pause, abort, release and resume; vLLM's names too."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from rootcellar.engine.identity import check_name
from rootcellar.errors import EngineError
from rootcellar.server.answer import on_thread, unless_gone
from rootcellar.server.callers import Access, caller_of
from rootcellar.server.errors import ApiError, invalid, json_response
from rootcellar.server.fields import CONTROL_IGNORED, CONTROL_REFUSED
from rootcellar.server.parsing import Body
from rootcellar.server.routes import AdminRoute, UserRoute, check
from rootcellar.server.state import ServerState, state_of

router = APIRouter(route_class=AdminRoute, tags=["Control"])
"""For whoever has the admin key."""
abort_router = APIRouter(route_class=UserRoute, tags=["Control"])
"""For users: they may end their own requests."""

Seconds = Annotated[float, Query(ge=0, le=3600, allow_inf_nan=False)]
Mode = Literal["wait", "abort", "retract"]


def ok(message: str, **more: Any) -> Response:
    """What SGLang's clients look for, and more."""
    return json_response({"success": True, "message": message, **more})


# -- the cache --------------------------------------------------------------------------------------------------------


@router.get("/flush_cache")
@router.post("/flush_cache")
async def flush_cache(request: Request, timeout: Seconds = 0.0) -> Response:
    """Forget every cached prefix. Requests that wait or run: 400, or wait so many seconds for their end."""
    state = state_of(request)
    await unless_gone(request, _flush(state, timeout))
    return ok("Cache flushed.")


async def _flush(state: ServerState, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            await on_thread(state.engine.flush_cache)
        except EngineError as error:
            if time.monotonic() >= end:
                raise ApiError(400, f"{error} (timeout={timeout:g} s)", code="cache_busy") from error
            await asyncio.sleep(0.02)
        else:
            return


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """vLLM's name of ``/flush_cache``."""
    await _flush(state_of(request), 0.0)
    return ok("Cache flushed.")


# -- memory -----------------------------------------------------------------------------------------------------------


class ControlBody(Body):
    """A body with the fields that SGLang's trainers send to all of these."""

    ignored = CONTROL_IGNORED
    refused = CONTROL_REFUSED


class MemoryRequest(ControlBody):
    """Which memory to give back or to take again: "kv_cache", "weights"; none named: both."""

    tags: list[str] | None = None


class ReleaseRequest(MemoryRequest):
    """How to give memory back; see ``Engine.release_memory_occupation``."""

    mode: Mode = "wait"
    preserve: bool = False
    clear_compiled: bool = False


@router.post("/release_memory_occupation")
async def release_memory_occupation(request: Request, body: ReleaseRequest | None = None) -> Response:
    """Give device memory back at once; until the resume, new requests get 503."""
    engine, body = state_of(request).engine, body or ReleaseRequest()
    freed = await on_thread(
        engine.release_memory_occupation,
        body.tags,
        mode=body.mode,
        preserve=body.preserve,
        clear_compiled=body.clear_compiled,
    )
    return ok("Memory released.", **freed)


@router.post("/resume_memory_occupation")
async def resume_memory_occupation(request: Request, body: MemoryRequest | None = None) -> Response:
    """Take the memory again; nothing compiles."""
    engine = state_of(request).engine
    taken = await on_thread(engine.resume_memory_occupation, None if body is None else body.tags)
    return ok("Memory resumed.", **taken)


@router.post("/sleep")
async def sleep(
    request: Request,
    level: Annotated[int, Query(ge=1, le=2)] = 1,  # noqa: ARG001 (clients send it)
    mode: Mode = "wait",
) -> Response:
    """vLLM's name of the release of all memory. Both levels do the same: weights come back from where they lie."""
    freed = await on_thread(state_of(request).engine.release_memory_occupation, None, mode=mode)
    return ok("Asleep.", **freed)


@router.post("/wake_up")
async def wake_up(request: Request, tags: Annotated[list[str] | None, Query()] = None) -> Response:
    """vLLM's name of the resume."""
    taken = await on_thread(state_of(request).engine.resume_memory_occupation, tags)
    return ok("Awake.", **taken)


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> Response:
    """Whether weights or cache are released."""
    status = await on_thread(state_of(request).engine.status)
    return json_response({"is_sleeping": bool(status["released"])})


# -- generation -------------------------------------------------------------------------------------------------------


class PauseRequest(ControlBody):
    """What becomes of the requests that run."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


@router.post("/pause_generation")
async def pause_generation(request: Request, body: PauseRequest | None = None) -> Response:
    """Compute nothing until ``/continue_generation``; new requests wait."""
    await on_thread(state_of(request).engine.pause_generation, "abort" if body is None else body.mode)
    return ok("Generation paused.")


class ContinueRequest(ControlBody):
    """Nothing: how to go on is known."""


@router.post("/continue_generation")
async def continue_generation(request: Request, body: ContinueRequest | None = None) -> Response:  # noqa: ARG001
    """Undo the pause."""
    await on_thread(state_of(request).engine.continue_generation)
    return ok("Generation continues.")


class AbortRequest(ControlBody):
    """The request to end, by its ``rid``, or all of them (which needs the admin key)."""

    rid: str = ""
    abort_all: bool = False


@abort_router.post("/abort_request")
async def abort_request(body: AbortRequest, request: Request) -> Response:
    """End what a call of the caller's computes: whoever waits gets what there is, with finish_reason "abort".

    ``aborted`` says how many answers that were. Whoever has the admin key ends anybody's.
    """
    engine = state_of(request).engine
    if body.abort_all:
        check(request.scope, Access.ADMIN)
        return ok("Requests ended.", aborted=await on_thread(engine.abort_all))
    if not body.rid:
        raise invalid("name the request: rid, or abort_all", "rid")
    caller = caller_of(request)
    check_name("rid", body.rid)
    ended = await on_thread(engine.abort_request, body.rid, None if caller.admin else caller.name)
    return ok("Request ended." if ended else "No such request; it may have ended.", aborted=ended)
