"""A real server for tests: `rootcellar serve` in a process of its own, or the app over a given engine on a thread."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn

from rootcellar.engine import Engine
from rootcellar.server.app import create_app
from rootcellar.server_config import ServerConfig

COMMAND = [str(Path(sys.executable).with_name("rootcellar")), "serve", "--port", "0", "--skip-server-warmup"]


class Server:
    """A `rootcellar serve` process; use it as a context manager.

    `url` is where it listens, `pid` its process, `log()` what it wrote so far. Leaving sends SIGTERM and waits.
    """

    def __init__(self, *words: str, max_total_tokens: int = 8192) -> None:
        self.words = [*COMMAND, "--max-total-tokens", str(max_total_tokens), *words]
        self._lines: list[str] = []

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._await_url()
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    def _await_url(self) -> str:
        for _ in range(1200):
            found = re.search(r" at (http://\S+:\d+)$", self.log(), re.MULTILINE)
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no server: {self.log()}")

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return "".join(self._lines)

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(sig)

    def __exit__(self, *_: object) -> None:
        self.stop()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()


@contextlib.contextmanager
def on_thread(engine: Engine, **settings: object) -> Iterator[str]:
    """The app over `engine`, listening on a port of its own; gives the URL."""
    app = create_app(engine, ServerConfig(**settings))
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    """Until `condition()` holds; an assertion error when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
