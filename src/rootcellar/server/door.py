"""What every request passes first: how long its body may be, and that its client gets to read the answer.

Written against ASGI itself, so that streams and disconnects pass through untouched.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rootcellar.server.errors import ApiError, Stopped, invalid

# Digits of a Content-Length beyond which nobody means a length.
_DIGITS = 32
# What is read and dropped of a body that was answered before it had come: many clients read the answer only when they
# have sent everything, and closing before that takes the answer from them.
_DRAINED_BYTES, _DRAINED_SECONDS, _SILENT_SECONDS = 256 * 2**20, 30.0, 5.0


class Door:
    """The outermost part of the app."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error; then see the rest of its body off."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "content-length" not in headers and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._limit)

        async def answer(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not last or body.ended or "expect" in headers:
                await send(message)
                return
            await send({**message, "more_body": True})  # all of the answer, but the connection stays
            await body.drop()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        refusal = self._refusal(headers.get("content-length", "0"))
        await (self._app if refusal is None else refusal.response())(scope, body.receive, answer)

    def _refusal(self, length: str) -> ApiError | None:
        if not (length.isascii() and length.isdecimal() and len(length) <= _DIGITS):
            error = invalid(f"Content-Length must be a plain number of bytes, not {length[:_DIGITS]!r}")
            error.headers = {"Connection": "close"}
            return error
        return _too_long(self._limit) if int(length) > self._limit else None


class _Body:
    """A request's body as it comes: ``receive`` raises once it is too long, ``drop`` reads what nobody wants.

    ``ended``: whether all of it has come, or will never come.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = self._left = limit
        self.ended = False

    async def receive(self) -> Message:
        """The next message; for the app."""
        message = await self._next()
        if self._left < 0:
            raise Stopped(_too_long(self._limit))
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        self.ended = self.ended or message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def drop(self) -> None:
        """Read on, so much and so long as a client deserves whose body is not wanted."""
        end = asyncio.get_running_loop().time() + _DRAINED_SECONDS
        floor = self._left - _DRAINED_BYTES
        while not self.ended and self._left > floor:
            left = end - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(min(left, _SILENT_SECONDS)):
                    await self._next()
            except TimeoutError:
                return


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is longer than {limit} bytes (max_body_bytes)", code="body_too_large",
        headers={"Connection": "close"},
    )  # fmt: skip
