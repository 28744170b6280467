"""The API's own description: its schema. The page that shows it, ``/docs``, is one of ``page/``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from rootcellar.server.errors import json_response
from rootcellar.server.routes import UserRoute

router = APIRouter(route_class=UserRoute, include_in_schema=False)


@router.get("/openapi.json")
async def schema(request: Request) -> Response:
    """The OpenAPI schema."""
    return json_response(request.app.openapi())
