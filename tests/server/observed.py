"""A server on a thread of the test's own process, for tests that look at it over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from rootcellar.engine import Engine
from rootcellar.server.app import create_app
from rootcellar.server_config import ServerConfig


@contextlib.contextmanager
def serving(engine: Engine, **options) -> Iterator[str]:
    """The URL of a server over ``engine``; gone at the end, and all that it started with it."""
    app = create_app(engine, ServerConfig(**options))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=3))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listener])))
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(app.state.server.observer.close(), loop).result(10)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"
        loop.close()
