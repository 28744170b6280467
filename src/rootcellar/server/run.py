"""``rootcellar serve``: the engine, the app and uvicorn in one process, from the banner to the last answer."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType
from typing import Any, cast

import uvicorn

from rootcellar.engine import Engine
from rootcellar.errors import ConfigError
from rootcellar.server.app import create_app
from rootcellar.server.browsers import Browsers, is_loopback
from rootcellar.server.callers import Callers
from rootcellar.server.connections import allow_files, protocol
from rootcellar.server.state import State
from rootcellar.server_config import ServerConfig
from rootcellar.units import gb

log = logging.getLogger(__name__)

# After the drain, for writing error answers and closing connections.
_LAST_SECONDS = 3
# Waiting requests unless max_queued_requests says otherwise: a server must not take what it cannot answer.
QUEUED = 1024


def serve(engine_options: dict[str, Any], config: ServerConfig) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    allow_files(config.max_connections)
    Browsers.of(config, open=Callers.of(config).open)  # what is wrong with a key or a host is said at once
    listener = _listen(config)  # before the seconds that a model takes
    with listener, Engine(**{"max_queued_requests": QUEUED, "log_level": "info", **engine_options}) as engine:
        if not config.skip_server_warmup:
            log.info("compiling; --skip-server-warmup would leave that to the first requests")
            engine.warm_up()
        app = create_app(engine, config)
        state: State = app.state.server
        print(banner(state, listener.getsockname()[1]), file=sys.stderr, flush=True)
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            http=cast(Any, protocol(config)),
            timeout_keep_alive=config.timeout_keep_alive,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        Server(settings, state).run(sockets=[listener])
    return 0


def _listen(config: ServerConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error}; choose another host or port"
        ) from None
    return listener


def banner(state: State, port: int) -> str:
    """What is served, from how much memory, and what to try first."""
    engine, config = state.engine, state.config
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{port}"
    key = " -H 'Authorization: Bearer $API_KEY'" if not state.callers.open else ""
    kv = engine.stats()["kv_cache_bytes"]
    lines = [
        f"rootcellar serves {state.model_name} at {url}",
        f"  memory   {gb(kv)} GB of KV cache: {engine.total_tokens:,} tokens in pages of {engine.config.page_size}, "
        f"{engine.attention_backend} attention",
        f"  limits   prompts of {state.longest_prompt:,} tokens, {engine.max_running_requests} requests at a time, "
        f"{engine.config.max_queued_requests} waiting",
        f"  try      curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d "
        """'{"messages": [{"role": "user", "content": "What is a KV cache?"}]}'""",
    ]
    if state.callers.open and not is_loopback(config.host):
        lines.append(
            f"  WARNING  anybody who reaches {config.host}:{port} can use this server, change its weights and read its "
            "cache: set --api-key, and --admin-api-key for the routes that change things, or --host 127.0.0.1"
        )
    return "\n".join(lines)


class Server(uvicorn.Server):
    """uvicorn, stopping as this server should: drain, then end what is left with an error, then close.

    The first signal begins the drain; a second one ends it.
    """

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state
        self._hurry = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the event loop, for signals."""
        self._event_loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or hurry. Called when a signal comes, wherever the main thread is."""
        if self._event_loop is None:
            super().handle_exit(sig, frame)
        else:
            self._event_loop.call_soon_threadsafe(self._stop, signal.Signals(sig).name)

    def _stop(self, why: str) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._finish(why))
        else:
            self._hurry.set()

    async def _finish(self, why: str) -> None:
        state, seconds = self._state, self._state.config.drain_timeout
        state.draining = True
        await state.observer.close()
        log.info("%s: no new requests; %d have up to %g seconds to finish", why, state.active, seconds)
        try:
            quiet = asyncio.create_task(state.quiet(seconds))
            hurry = asyncio.create_task(self._hurry.wait())
            await asyncio.wait({quiet, hurry}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if state.active:
                message = "the server is shutting down, and the request took longer than drain_timeout"
                ended = await asyncio.to_thread(state.engine.abort_all, message, shutdown=True)
                log.warning("%d requests ended with an error", ended)
                await state.quiet(_LAST_SECONDS)
        finally:
            self.should_exit = True
