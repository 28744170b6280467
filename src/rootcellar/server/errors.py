"""Errors as clients see them: ``{"error": {message, type, param, code}}``, on every route."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rootcellar.errors import (
    CacheBroken,
    ConfigError,
    EngineError,
    ModelError,
    QueueFull,
    RequestError,
    RequestTooLarge,
    RootcellarError,
)

log = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}
# A message may quote what was sent.
_LONGEST = 2000
_SECONDS_TO_RETRY = "1"


@dataclass
class ApiError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        message = self.message if len(self.message) <= _LONGEST else self.message[:_LONGEST] + " ..."
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return json_response(self.body(), self.status, self.headers)


class Stopped(HTTPException):
    """An error found while FastAPI reads a body, where it lets this class through and no other."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message, dict(error.headers))
        self.error = error


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``content`` as JSON."""
    return json_bytes(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS), status, headers)


def json_bytes(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """What is JSON already."""
    return Response(body, status, headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, param, code)


def api_error(error: Exception) -> ApiError:
    """What a client should see of an error of ours."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case RequestTooLarge():
            return ApiError(400, message, _named(message), "context_length_exceeded")
        case RequestError() | ConfigError() | ModelError():
            return ApiError(400, message, _named(message))
        case QueueFull():
            return ApiError(429, message, code="queue_full", headers={"Retry-After": _SECONDS_TO_RETRY})
        case EngineError():
            return ApiError(503, message, code="unavailable", headers={"Retry-After": _SECONDS_TO_RETRY})
        case CacheBroken():
            return ApiError(500, message, code="cache_broken")
        case _:
            return ApiError(500, f"{type(error).__name__}: {error}", code="internal_error")


def _named(message: str) -> str | None:
    """The parameter that a message of ours begins with: ``temperature=-1 is not allowed: ...``."""
    found = re.match(r"(?:prompt \d+: )?(\w+)=", message)
    return found[1] if found else None


def ended_early(finish: Mapping[str, Any]) -> ApiError | None:
    """The error that a finish_reason stands for; None when the answer counts, as one that was aborted on request."""
    status = {"timeout": 504, "no_room": 503, "shutdown": 503, "failed": 500, "grammar": 400}.get(
        finish.get("cause") or ""
    )
    return None if status is None else ApiError(status, str(finish["message"]), code=str(finish["cause"]))


def install(app: FastAPI) -> None:
    """Let ``app`` answer every error in this form."""

    async def ours(_request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed: %s: %s", request.method, request.url.path, type(error).__name__, error)
        return api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, Stopped):
            return error.error.response()
        message, headers = str(error.detail), error.headers or {}
        if error.status_code == 405 and "Allow" in headers:
            message = f"this route does not take {request.method}: use {headers['Allow']}"
        return ApiError(error.status_code, message, headers=headers).response()

    async def not_valid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return wrong_body(request, error).response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(RootcellarError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(Exception, unexpected)


def wrong_body(request: Request, error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body or a query, in one sentence."""
    kind = request.headers.get("content-type", "")
    if isinstance(error.body, bytes) and "json" not in kind:
        return ApiError(415, f"the body must be JSON: send the header Content-Type: application/json, not {kind!r}")
    # Of the arms of a union the one that fits best is the one that got farthest.
    first = max(error.errors()[:16], key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return invalid(f"the body is no valid JSON: {reason} (at byte {first['loc'][-1]})")
    where = [str(part) for part in first["loc"] if part not in ("body", "query")]
    # pydantic names the arms of a union after the field; what the caller wrote is the first part.
    name = where[0] if where else None
    return invalid(f"{name or 'body'}: {first['msg']}", param=name)
