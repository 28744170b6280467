"""JSON bodies through orjson: it is fast, and refuses what is no JSON (NaN, lone surrogates, broken UTF-8)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response


class OrjsonRequest(Request):
    """A request whose ``json`` is orjson's."""

    async def json(self) -> Any:
        """The body's value; ``orjson.JSONDecodeError``, which is a ``json.JSONDecodeError``, when it is none."""
        return orjson.loads(await self.body())


class OrjsonRoute(APIRoute):
    """A route whose handler reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind ``OrjsonRequest``."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(OrjsonRequest(request.scope, request.receive))

        return read
