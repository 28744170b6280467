"""Is the server alive, and would it take work now?"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.answer import on_thread, whole
from rootcellar.server.errors import ApiError, json_response
from rootcellar.server.state import State, state_of

router = APIRouter(tags=["Health"])

# A step of a large model on a slow device takes seconds; twenty without any is no progress.
_SECONDS = 20
_FIRST = 2**31 - 1  # before every other request


@router.get("/health")
@router.get("/health_generate", include_in_schema=False)
async def health(request: Request) -> Response:
    """Generate one token. 503 when none comes and nothing else advances either.

    While generation is paused or memory is released on purpose, an answer from the engine's thread is enough.
    """
    state = state_of(request)
    before = await _status(state)
    if before["paused"] or before["released"]:
        return json_response({"status": "asleep", "paused": before["paused"], "released": before["released"]})
    try:
        await asyncio.wait_for(
            whole(
                request,
                state,
                input_ids=[0],
                sampling_params={"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
                priority=_FIRST,
                extra_key="health",
            ),
            _SECONDS,
        )
    except TimeoutError:
        if (await _status(state))["steps"] == before["steps"]:
            raise ApiError(503, f"no token in {_SECONDS} seconds", code="unhealthy") from None
    return json_response({"status": "ok"})


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


async def _status(state: State) -> dict[str, object]:
    """The engine's own word, from its thread."""
    try:
        return await asyncio.wait_for(on_thread(state.engine.status), _SECONDS)
    except TimeoutError:
        raise ApiError(503, f"the engine did not answer in {_SECONDS} seconds", code="unhealthy") from None
