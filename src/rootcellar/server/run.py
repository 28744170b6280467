"""``rootcellar serve``: the engine, the app and uvicorn in one process, from the first refusal to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from rootcellar.errors import ConfigError
from rootcellar.server.browsers import Browsers, is_loopback
from rootcellar.server.callers import Callers
from rootcellar.server.connections import allow_files, protocol
from rootcellar.server.loading import Loading
from rootcellar.server.state import ServerState
from rootcellar.server_config import ServerConfig
from rootcellar.units import gb

log = logging.getLogger(__name__)

# After the drain, for writing error answers and closing connections.
_LAST_SECONDS = 3
# Connections that may wait to be accepted, and those that are accepted in one go. asyncio takes one number for both,
# and whoever opens hundreds at once would keep the loop from everybody for as long.
_BACKLOG = 2048
_ACCEPTED = 2
# After which a thread that computes in Python lets another do so. A step asks for its turn a dozen times, and would
# wait Python's 5 ms each time for whoever reads a large body.
_SWITCH_SECONDS = 0.0005
# How often Python's collector looks at new objects, at those that stayed, and at all. By default it walks through all
# that some thousand waiting requests hold every few seconds, for a tenth of a second in which no thread goes on; next
# to nothing of a server's is in circles that only the collector frees.
_COLLECT = (1_000, 10, 5_000)
# A server must not take what it cannot answer: engine settings that it sets, unless its user does.
SERVED = {
    "max_queued_requests": 1024,
    "max_request_tokens": 2**23,
    "max_request_logprobs": 2**20,
    "log_level": "info",
}


def serve(engine_options: dict[str, Any], config: ServerConfig) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status. What goes wrong while the model is loaded is raised."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    options = {**SERVED, **engine_options}
    logging.getLogger("rootcellar").setLevel(options["log_level"].upper())
    sys.setswitchinterval(_SWITCH_SECONDS)
    allow_files(config.max_connections)
    Browsers.of(config, open=Callers.of(config).open)  # what is wrong with a key or a host is said at once
    loading = Loading(options, config)
    with listen(config) as listener:
        port = listener.getsockname()[1]
        server = Server(uvicorn_config(loading, config), loading, port)
        log.info("listening on %s; requests are refused with 503 until the model is there", url_of(config, port))
        server.run(sockets=[listener])
    if loading.error is not None:
        raise loading.error
    if loading.state is None and not loading.follows and server.signal is not None:
        # Nobody waits for a thread that loads or compiles: the process ends as one that listens to no signal.
        signal.signal(server.signal, signal.SIG_DFL)
        signal.raise_signal(server.signal)
    if loading.state is not None:
        loading.state.close()
    if loading.engine is not None:
        loading.engine.shutdown()
    gc.unfreeze()  # what was kept from the collector while it served may go
    return 0


def uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn serves ``app``."""
    return uvicorn.Config(
        app,
        port=config.port,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        http=cast(Any, protocol(config)),
        backlog=_ACCEPTED,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )


def url_of(config: ServerConfig, port: int) -> str:
    """Where the server listens."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{port}"


def listen(config: ServerConfig) -> socket.socket:
    """A socket at the server's address, for an :class:`Accepting`. Raises ``ConfigError``."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends small packets at once (TCP_NODELAY) only where the socket says that it is TCP; otherwise an
        # answer in two parts waits 40 ms for the client's acknowledgement of the first.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error}; choose another host or port"
        ) from None
    return listener


def banner(state: ServerState, port: int) -> str:
    """What is served, from how much memory, and what to try first."""
    engine, config = state.engine, state.config
    url = url_of(config, port)
    with_key = " -H 'Authorization: Bearer $API_KEY'" if not state.callers.open else ""
    kv = engine.stats()["kv_cache_bytes"]
    lines = [
        f"rootcellar serves {state.model_name} at {url}",
        f"  memory   {gb(kv)} GB of KV cache: {engine.total_tokens:,} tokens in pages of {engine.config.page_size}, "
        f"{engine.attention_backend} attention",
        f"  limits   prompts of {state.longest_prompt:,} tokens, {engine.max_running_requests} requests at a time, "
        f"{engine.config.max_queued_requests} waiting",
        f"  page     {url}/ shows the cache at work",
        f"  try      curl {url}/v1/chat/completions -H 'Content-Type: application/json'{with_key} -d "
        """'{"messages": [{"role": "user", "content": "What is a KV cache?"}]}'""",
    ]
    if state.callers.open and not is_loopback(config.host):
        lines.append(
            f"  WARNING  anybody who reaches {config.host}:{port} can use this server, change its weights and read its "
            "cache: set --api-key, and --admin-api-key for the routes that change things, or --host 127.0.0.1"
        )
    return "\n".join(lines)


class Accepting(uvicorn.Server):
    """uvicorn that accepts few connections in one go, out of many that wait.

    A queue as short as that overflows under a crowd, and whoever the kernel then forgets waits for a minute.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; on ``sockets`` of :func:`listen`."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)


class Server(Accepting):
    """uvicorn, stopping as this server should: drain, then end what is left with an error, then close.

    The first signal begins the drain; a second one ends it.
    """

    def __init__(self, config: uvicorn.Config, loading: Loading, port: int) -> None:
        super().__init__(config)
        self._loading = loading
        self._port = port
        self.signal: signal.Signals | None = None
        self._hurry = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load."""
        loop = self._event_loop = asyncio.get_running_loop()
        await super().startup(sockets)

        def failed() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._end)

        self._loading.start(self._ready, failed)

    def _ready(self, state: ServerState) -> None:
        # Nothing of what is there now becomes garbage: the collector need not walk through it while requests wait.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        print(banner(state, self._port), file=sys.stderr, flush=True)

    def _end(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or hurry. Called when a signal comes, wherever the main thread is."""
        if self._event_loop is None:
            super().handle_exit(sig, frame)
        else:
            self.signal = self.signal or signal.Signals(sig)
            self._event_loop.call_soon_threadsafe(self._stop, signal.Signals(sig).name)

    def _stop(self, why: str) -> None:
        if self._loading.state is None:
            log.info("%s: stopped while %s", why, "following" if self._loading.follows else self._loading.progress)
            self._loading.stop()
            self._end()
        elif self._drain is None:
            self._drain = asyncio.create_task(self._finish(why, self._loading.state))
        else:
            self._hurry.set()

    async def _finish(self, why: str, state: ServerState) -> None:
        seconds = state.config.drain_timeout
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
