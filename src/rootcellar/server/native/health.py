"""Is the server alive, and would it take work now?"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import Response

import rootcellar
from rootcellar.errors import QueueFull
from rootcellar.server.answer import Result, counts
from rootcellar.server.errors import ApiError, json_response
from rootcellar.server.routes import PublicRoute
from rootcellar.server.state import ServerState, state_of

router = APIRouter(route_class=PublicRoute, tags=["Health"])

# A step of a large model on a slow device takes seconds; twenty without any is no progress.
_SECONDS = 20
_PAUSE = 0.02
# Whoever asks again so soon gets the last answer.
FRESH_SECONDS = 1.0
_ONE_TOKEN: dict[str, Any] = {
    "input_ids": [0],
    "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
    "tenant": "(health)",  # no key has such a name
}


@router.get("/health")
@router.get("/health_generate", include_in_schema=False)
async def health(request: Request) -> Response:
    """Whether the engine advances: an idle one generates a token, a busy one does a step. 503 when neither comes.

    While generation is paused or memory is released on purpose, an answer from the engine's thread is enough. All who
    ask within a second share one check.
    """
    return json_response(await state_of(request).health.result())


@router.get("/ping")
@router.post("/ping", include_in_schema=False)
async def ping(request: Request) -> Response:
    """``/health`` by the name that SageMaker asks for."""
    return await health(request)


@router.get("/version")
async def version() -> Response:
    """The server's version, as vLLM gives it."""
    return json_response({"version": rootcellar.__version__})


async def check(state: ServerState) -> dict[str, Any]:
    """What ``/health`` says of this server; ``ApiError`` when it is not well."""
    before = await _status(state)
    try:
        async with asyncio.timeout(_SECONDS):
            while (now := await _status(state))["steps"] == before["steps"]:
                if now["paused"] or now["released"]:
                    return {"status": "asleep", "paused": now["paused"], "released": now["released"]}
                if not now["unfinished"]:
                    await _one_token(state)
                    break
                await asyncio.sleep(_PAUSE)
    except TimeoutError:
        if (await _status(state))["steps"] == before["steps"]:
            raise ApiError(503, f"no step in {_SECONDS} seconds", code="unhealthy") from None
    return {"status": "ok"}


async def _one_token(state: ServerState) -> None:
    with contextlib.suppress(QueueFull):  # others came first, and the engine has something to do
        counts(cast(Result, await state.engine.async_generate(raise_on_failure=False, **_ONE_TOKEN)))


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when new requests would be computed; 503 while the server drains, sleeps or is paused."""
    state = state_of(request)
    status = await _status(state)
    reasons = ["the server is shutting down"] if state.draining else []
    reasons += ["generation is paused"] if status["paused"] else []
    reasons += [f"{' and '.join(status['released'])} released"] if status["released"] else []
    if reasons:
        raise ApiError(503, "not ready: " + ", ".join(reasons), code="not_ready")
    return json_response({"status": "ready"})


async def _status(state: ServerState) -> dict[str, Any]:
    """The engine's own word, from its thread."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(state.engine.sight.asked_status()), _SECONDS)
    except TimeoutError:
        raise ApiError(503, f"the engine did not answer in {_SECONDS} seconds", code="unhealthy") from None
