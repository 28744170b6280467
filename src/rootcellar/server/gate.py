"""What each request passes before its route sees it: keys, and the end of the server.

Written against ASGI itself, so that streams and disconnects pass through untouched.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable
from enum import IntEnum

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rootcellar.server.errors import ApiError
from rootcellar.server.state import State

log = logging.getLogger(__name__)

_IS_ADMIN = "rootcellar.admin"


class Access(IntEnum):
    """Who may call a route."""

    PUBLIC = 0
    USER = 1
    ADMIN = 2


class Gate:
    """The part of the app before its routes."""

    def __init__(self, app: ASGIApp, state: State, access: dict[str, Access]) -> None:
        """``access``: by path; what is not named there is for users."""
        self._app = app
        self._state = state
        self._access = access
        config = state.config
        self._user_keys = [key.encode() for key in (config.api_key, config.admin_api_key) if key is not None]
        self._admin_keys = [key.encode() for key in (config.admin_api_key or config.api_key,) if key is not None]
        self._open = config.api_key is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._state.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.leave()

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        given = headers.get("authorization", "")
        token = given[7:].strip().encode("latin-1") if given[:7].lower() == "bearer " else b""
        admin = not self._admin_keys or _matches(token, self._admin_keys)
        scope[_IS_ADMIN] = admin
        access = self._access.get(scope["path"].rstrip("/") or "/", Access.USER)
        if access is Access.ADMIN and not admin:
            name = "admin_api_key" if self._state.config.admin_api_key is not None else "api_key"
            return _unauthorized(f"this route needs the server's {name}, as 'Authorization: Bearer KEY'")
        if access is Access.USER and not (self._open or _matches(token, self._user_keys)):
            return _unauthorized("this server needs its api_key, as 'Authorization: Bearer KEY'")
        if self._state.draining and scope["method"] == "POST":
            return ApiError(
                503, "the server is shutting down", code="shutdown", headers={"Retry-After": "5", "Connection": "close"}
            )
        return None


def require_admin(request: Request) -> None:
    """Refuse a part of a route to whoever has no admin key."""
    if not request.scope[_IS_ADMIN]:
        raise _unauthorized("this needs the server's admin_api_key, as 'Authorization: Bearer KEY'")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _matches(token: bytes, keys: Iterable[bytes]) -> bool:
    """Whether ``token`` is one of ``keys``, in a time that does not tell how much of it was right."""
    return sum(hmac.compare_digest(token, key) for key in keys) > 0
