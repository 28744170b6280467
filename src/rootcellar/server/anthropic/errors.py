"""Errors in Anthropic's form: ``{"type": "error", "error": {"type", "message", ...}}``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rootcellar.errors import RootcellarError
from rootcellar.server.answer import named_event
from rootcellar.server.errors import ApiError, Stopped, api_error, json_response, wrong_body
from rootcellar.server.routes import UserRoute

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def body_of(error: ApiError) -> dict[str, Any]:
    """The JSON of it; ``param`` and ``code`` are those of every other route."""
    told = error.body()["error"]
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {**told, "type": kind}}


def event(error: ApiError) -> bytes:
    """An error in the middle of a stream."""
    return named_event(body_of(error))


class AnthropicRoute(UserRoute):
    """For users, with errors that Anthropic's clients know."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse in Anthropic's words."""
        try:
            await super().handle(scope, receive, send)
        except ApiError as error:  # who may call
            await _response(error)(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, whose errors are answered here."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except Stopped as error:
                return _response(error.error)
            except RequestValidationError as error:
                return _response(wrong_body(request, error))
            except HTTPException as error:
                return _response(ApiError(error.status_code, str(error.detail)))
            except (ApiError, RootcellarError) as error:
                return _response(api_error(error))

        return answer


def _response(error: ApiError) -> Response:
    return json_response(body_of(error), error.status, error.headers)
