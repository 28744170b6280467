"""The API's own description: its schema, and a page to try it out."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

from rootcellar.server.errors import json_response
from rootcellar.server.routes import UserRoute

router = APIRouter(route_class=UserRoute, include_in_schema=False)


@router.get("/openapi.json")
async def schema(request: Request) -> Response:
    """The OpenAPI schema."""
    return json_response(request.app.openapi())


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Swagger's page over it."""
    root = request.scope.get("root_path", "").rstrip("/")
    return get_swagger_ui_html(openapi_url=f"{root}/openapi.json", title=request.app.title)
