"""Connections are read in turns: whoever kept the event loop busy waits, and others go on."""

import asyncio

import pytest
import uvicorn

from rootcellar.server import run
from rootcellar.server.pace import Pace
from rootcellar.server_config import ServerConfig


@pytest.fixture
def made():
    """``made(app, pace, tenant)``: a connection whose last request was ``tenant``'s."""

    def make(app, pace, tenant):
        config = run.uvicorn_config(app, ServerConfig())
        config.load()
        connection = config.http_protocol_class(config, uvicorn.server.ServerState(), {}, None)
        connection._pace, connection._payer = pace, tenant
        connection.connection_made(Transport())
        pace.account(tenant)
        return connection

    return make


async def a_moment(seconds):
    await asyncio.sleep(min(seconds, 0.001))


async def happens(what):
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.001)


def test_whoever_kept_the_loop_busy_waits_until_the_next_request_is_read(made):
    """What comes meanwhile is read later, in its order; others' connections go on."""
    asked, now = [], [100.0]

    async def app(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def main():
        pace = Pace(clock=lambda: now[0], spent=lambda: 0.0, sleep=a_moment)
        busy, other = (made(app, pace, tenant) for tenant in ("hostile", "victim"))
        pace.account("hostile").spend(1.0)
        for piece in (b"GET /a HTTP/1.1\r\nHo", b"st: x\r\n\r\n"):
            busy.data_received(piece)
        other.data_received(b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n")
        await happens(lambda: asked)
        assert asked == ["/b"]
        assert busy.flow.read_paused
        assert not other.flow.read_paused
        now[0] += 1.0
        await happens(lambda: asked == ["/b", "/a"])
        assert not busy.flow.read_paused
        # Nothing is left of one that goes away while it waits.
        pace.account("hostile").spend(1.0)
        busy._payer = "hostile"
        busy.data_received(b"GET /c HTTP/1.1\r\n\r\n")
        waits = busy._turn
        busy.connection_lost(None)
        other.connection_lost(None)
        await happens(waits.done)
        assert waits.cancelled()
        assert asked == ["/b", "/a"]

    asyncio.run(main())


def test_a_connection_that_cannot_be_read_in_its_turn_is_closed(made):
    async def main():
        now = [100.0]
        pace = Pace(clock=lambda: now[0], spent=lambda: 0.0, sleep=a_moment)
        connection = made(None, pace, "hostile")
        made(None, pace, "victim")
        pace.account("hostile").spend(1.0)
        connection.data_received(b"GET / HTTP/1.1\r\n")
        waits, connection.parser = connection._turn, None
        now[0] += 1.0
        await happens(waits.done)
        assert isinstance(waits.exception(), AttributeError)
        assert connection.transport.is_closing()

    asyncio.run(main())


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written, self.closing = b"", False

    def write(self, data):
        self.written += bytes(data)

    def close(self):
        self.closing = True

    abort = close

    def is_closing(self):
        return self.closing

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass
