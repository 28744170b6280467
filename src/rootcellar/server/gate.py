"""What each request passes before its route sees it: who sends it and from where, and the end of the server.

What a caller may do is the route's own business (``routes.py``). Written against ASGI itself, so that streams and
disconnects pass through untouched.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rootcellar.server.browsers import foreign
from rootcellar.server.callers import note_caller, paying
from rootcellar.server.errors import ApiError, invalid
from rootcellar.server.pace import at_the_pace_of
from rootcellar.server.routes import note_link
from rootcellar.server.state import ServerState

# No path of ours has one, and who writes one means to be read in two ways.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")


class Gate:
    """The part of the app before its routes."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        """``app`` behind the gate."""
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = self._state.callers.of_token(_token(headers))
        note_caller(scope, caller)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        account = self._state.pace.account(paying(scope))
        answer = at_the_pace_of(account, _coroutine(self._app, scope, receive, send))
        if scope["method"] != "POST":
            await answer
            return
        self._state.enter()
        try:
            await answer
        finally:
            self._state.leave()

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if _CONTROL.search(scope["path"]):
            return invalid("the path has a control character in it")
        refusal = self._state.browsers.refusal(headers)
        if refusal is not None:
            return refusal
        if self._state.browsers.comes_from_elsewhere(headers):
            # A link may lead to a page here; whatever else another page embeds or sends is none of its business.
            if scope["method"] not in ("GET", "HEAD") or headers.get("sec-fetch-mode") != "navigate":
                return foreign("pages from elsewhere")
            note_link(scope)
        if self._state.draining and scope["method"] == "POST":
            return ApiError(
                503, "the server is shutting down", code="shutdown", headers={"Retry-After": "5", "Connection": "close"}
            )
        return None


async def _coroutine(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def _token(headers: Headers) -> bytes:
    given = headers.get("authorization", "")
    if given[:7].lower() == "bearer ":
        return given[7:].strip().encode("latin-1")
    return headers.get("x-api-key", "").strip().encode("latin-1")  # as Anthropic's clients send it
