"""``GET /v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.errors import json_response
from rootcellar.server.routes import UserRoute
from rootcellar.server.state import ServerState, state_of

router = APIRouter(route_class=UserRoute, tags=["OpenAI"])


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    return json_response({"object": "list", "data": [_card(state_of(request))]})


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> Response:
    """The same by its name; 404 for another."""
    state = state_of(request)
    state.require_model(model)
    return json_response(_card(state))


def _card(state: ServerState) -> dict[str, Any]:
    # Routers look here for whose fields a server of prefill or decode knows, and name rooms to none but SGLang's.
    apart = state.engine.config.disaggregation_mode != "null"
    return {
        "id": state.model_name,
        "object": "model",
        "created": int(state.started),
        "owned_by": "sglang" if apart else "rootcellar",
        "root": state.engine.config.model_path,
        "parent": None,
        "max_model_len": state.longest_prompt + 1,
    }
