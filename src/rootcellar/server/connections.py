"""Connections: how many there may be, how long each may take over a request, and how much its head may weigh.

uvicorn's protocol over httptools has no such limits, and neither has httptools. They stand here, at one place, below
the app: what is refused here costs no task, no route and no key check.

A connection is *held up* while the next step is its client's: it was opened and sends nothing, its head or its body is
not there yet, it is kept alive between two requests, or its client does not read. When there are too many connections,
the one that has been held up longest makes room; only when each of them has a request that this server works on is a
new one turned away.

Reading a request takes time of the event loop before the app knows whose it is, and hundreds of connections may send
at once: whoever's requests took much of it lately waits with the next (``pace.py``). A connection is its last request's
tenant's, and at first nobody's.
"""

from __future__ import annotations

import asyncio
import functools
import resource
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from rootcellar.server.callers import paying
from rootcellar.server.errors import ApiError
from rootcellar.server.pace import Pace
from rootcellar.server_config import ServerConfig

# Requests that one connection may send before it has the answer to the first; each of them waits in memory.
_PIPELINED = 16
# A connection that was refused stays open so long, for its client to read why; so many may at a time.
_FAREWELL_SECONDS, _FAREWELLS = 2.0, 64


class _Refused(Exception):
    """Ends the parsing of a head; raised in httptools' callbacks."""


class Connection(HttpToolsProtocol):
    """One connection; uvicorn makes it.

    ``limits`` are the server's settings; ``held_up`` has the connections of the whole server that are, longest first;
    ``pace`` says whose requests may be read.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ServerConfig,
        held_up: dict[Connection, None],
        pace: Pace,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._held_up = held_up
        self._timer: asyncio.TimerHandle | None = None
        self._refusal: ApiError | None = None
        self._in_head = False
        self._head_bytes = 0  # of the head under way: what its parsed fields have
        self._raw_bytes = 0  # and the pieces that held nothing else, whose last field may still be growing
        self._answering = 0
        self._pace = pace
        self._payer = paying(None)
        self._unread: list[bytes] = []
        self._turn: asyncio.Task[None] | None = None  # in which what is unread will be read

    # -- how many -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let it in, if need be in the place of another, or say that there is no room."""
        super().connection_made(transport)
        most = self._limits.max_connections
        if len(self.connections) > most:
            longest = next(iter(self._held_up), None)
            if longest is None:
                self._turn_away(most)
                return
            longest.give_up()
        self._hold_up()
        self._expect(self._limits.timeout_header)

    def _turn_away(self, most: int) -> None:
        if len(self.connections) > most + _FAREWELLS:
            self.transport.abort()
            return
        message = f"{most} connections are busy (max_connections): try again later"
        self._refuse(ApiError(503, message, code="too_many_connections", headers={"Retry-After": "1"}))

    def give_up(self) -> None:
        """End the connection at once."""
        self._held_up.pop(self, None)
        self._cancel()
        self.transport.abort()

    def _hold_up(self) -> None:
        """The next step is the client's."""
        self._held_up.pop(self, None)
        self._held_up[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._held_up.pop(self, None)
        self._cancel()
        if self._turn is not None:
            self._turn.cancel()
        super().connection_lost(exc)

    # -- how long -------------------------------------------------------------------------------------------------

    def _expect(self, seconds: float) -> None:
        """Something must be over within ``seconds``; there is one such thing at a time."""
        self._cancel()
        self._timer = self.loop.call_later(seconds, self._late)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing() or self.flow.write_paused:
            self.give_up()  # the client does not read
        elif self._in_head:
            self._refuse(_too_slow("header", "timeout_header", self._limits.timeout_header))
        elif self.cycle is None:
            self.transport.close()  # not one byte came
        elif self.pipeline or self._answering > 1:
            self._expect(self._limits.timeout_body)  # its body is not read while the answer before it is made
        elif not self.cycle.response_started:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._refuse(_too_slow("body", "timeout_body", self._limits.timeout_body))
        else:
            self.give_up()  # it has its answer and goes on sending

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._hold_up()
        self._expect(self._limits.timeout_write)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._held_up.pop(self, None)
        if self.transport.is_closing():
            self._expect(self._limits.timeout_write)
        else:
            self._cancel()

    def on_response_complete(self) -> None:
        """An answer has been written, to the socket or to the buffer before it."""
        super().on_response_complete()
        self._payer = paying(self.scope)
        self._answering -= 1
        if self.transport.is_closing():
            self._expect(self._limits.timeout_write)  # for what the client has not read yet
        elif not self._answering and not self._in_head:
            self._hold_up()

    # -- heads and bodies -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read, in its tenant's turn."""
        account = self._pace.account(self._payer)
        if self._turn is None and account.free:
            self._read(data)
            return
        self._unread.append(data)
        self.flow.pause_reading()
        if self._turn is None:
            self._turn = self.loop.create_task(self._read_in_turn())

    async def _read_in_turn(self) -> None:
        await self._pace.account(self._payer).turn()
        data, self._unread, self._turn = b"".join(self._unread), [], None
        if not self.transport.is_closing():
            self.flow.resume_reading()
            try:
                self._read(data)
            except Exception:
                self.give_up()  # as asyncio does with one that raises when it is told of data
                raise

    def _read(self, data: bytes) -> None:
        """Parse; what follows a refusal is read and dropped, so that the client gets to read the answer."""
        if self._refusal is not None:
            return
        began, began_before = self._pace.spent(), self._in_head
        super().data_received(data)
        if self._in_head and began_before and self._refusal is None:
            self._raw_bytes += len(data)
            if self._raw_bytes > self._limits.max_header_bytes:
                self._refuse(self._too_large())
        self._pace.account(self._payer).spend(self._pace.spent() - began)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._raw_bytes = 0
        if self._timer is None:
            self._expect(self._limits.timeout_header)

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        self._weigh(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole field of the head."""
        if len(self.headers) >= self._limits.max_headers:
            message = f"more than {self._limits.max_headers} header fields (max_headers)"
            self._stop(ApiError(431, message, code="headers_too_large"))
        self._weigh(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _weigh(self, nbytes: int) -> None:
        self._head_bytes += nbytes
        if self._head_bytes > self._limits.max_header_bytes:
            self._stop(self._too_large())

    def _too_large(self) -> ApiError:
        message = f"the request's line and headers are longer than {self._limits.max_header_bytes} bytes"
        return ApiError(431, f"{message} (max_header_bytes)", code="headers_too_large")

    def _stop(self, refusal: ApiError) -> None:
        self._refusal = refusal
        raise _Refused

    def on_headers_complete(self) -> None:
        """The head is there: the app begins, and the body must come in time."""
        if len(self.pipeline) >= _PIPELINED:
            message = f"more than {_PIPELINED} requests on one connection before the first was answered"
            self._stop(ApiError(400, message, code="too_many_pipelined"))
        self._in_head = False
        self._answering += 1
        super().on_headers_complete()
        self._expect(self._limits.timeout_body)

    def on_message_complete(self) -> None:
        """The request is whole: what comes next is this server's to do."""
        super().on_message_complete()
        self._cancel()
        if self._answering:
            self._held_up.pop(self, None)

    # -- refusals -------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """uvicorn's hook for what cannot be parsed: with the reason that one of the callbacks had."""
        refusal, self._refusal = self._refusal, None
        self._refuse(refusal or ApiError(400, msg, code="invalid_http"))

    def _refuse(self, refusal: ApiError) -> None:
        """Answer, and close once the client has had time to read that."""
        self._refusal = refusal
        if not (self.cycle is None or self.cycle.response_complete or self.cycle.disconnected):
            self.give_up()  # the answer before is under way, and another in the middle of it would be read as its part
            return
        response = refusal.response()
        fields = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        head = [STATUS_LINE[refusal.status], *fields, b"connection: close\r\n\r\n"]
        self.transport.write(b"".join([*head, bytes(response.body)]))
        self._hold_up()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._cancel()
        self._timer = self.loop.call_later(_FAREWELL_SECONDS, self.give_up)


def _too_slow(what: str, name: str, seconds: float) -> ApiError:
    return ApiError(408, f"the request's {what} did not come within {seconds:g} seconds ({name})", code="too_slow")


def protocol(limits: ServerConfig) -> Callable[..., Connection]:
    """What uvicorn makes connections with (its setting ``http``), for one server."""
    held_up: dict[Connection, None] = {}
    return functools.partial(Connection, limits=limits, held_up=held_up, pace=Pace())


def allow_files(connections: int) -> None:
    """Raise the process's own limit on open files, as far as it may, to what so many connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 512  # the model's files, the listener, threads, and connections that are being refused
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
