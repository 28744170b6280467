"""JSON bodies through orjson: it is fast, and refuses what is no JSON (NaN, broken UTF-8).

What it reads but cannot write is refused as well: lone surrogates, integers beyond 64 bits, nesting without end. Then
whatever a client sent can be tokenized, passed on and quoted in an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response


class OrjsonRequest(Request):
    """A request whose ``json`` is orjson's."""

    async def json(self) -> Any:
        """The body's value; ``json.JSONDecodeError`` when it is none."""
        value = orjson.loads(await self.body())
        try:
            orjson.dumps(value)
        except orjson.JSONEncodeError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None
        return value


class OrjsonRoute(APIRoute):
    """A route whose handler reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind ``OrjsonRequest``."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(OrjsonRequest(request.scope, request.receive))

        return read
