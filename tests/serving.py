"""A real server for tests: `rootcellar serve` in a process of its own, or the app over a given engine on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from rootcellar.engine import Engine
from rootcellar.server.app import create_app
from rootcellar.server.run import Accepting, listen, uvicorn_config
from rootcellar.server_config import ServerConfig

COMMAND = [sys.executable, "-m", "rootcellar", "serve", "--port", "0"]


class Server:
    """A `rootcellar serve` process; use it as a context manager.

    `url` is where it listens, `pid` its process, `log()` what it wrote so far. Leaving sends SIGTERM and waits.
    """

    def __init__(self, *words: str, max_total_tokens: int = 8192, warm: bool = False) -> None:
        start = COMMAND if warm else [*COMMAND, "--skip-server-warmup"]
        self.words = [*start, "--max-total-tokens", str(max_total_tokens), *words]
        self._lines: list[str] = []

    def start(self) -> None:
        """Start the process; it may still be loading."""
        self.process = subprocess.Popen(self.words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Server:
        self.start()
        self.url = self._await_url()
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    def _await_url(self) -> str:
        for _ in range(3600):
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
    limits = ServerConfig(**{"port": 0, **settings})
    app = create_app(engine, limits)
    with listen(limits) as listener:
        server = Accepting(uvicorn_config(app, limits))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            app.state.server.close()


def wait_until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    """Until `condition()` holds; an assertion error when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def idle(engine: Engine) -> None:
    """Wait for the engine to come to rest, and see that nothing leaked."""
    wait_until(lambda: not (engine.stats()["running"] or engine.stats()["waiting"]))
    engine.check()
    shelf = engine.stats()["cache"]["full"]["DEVICE"]
    assert shelf["free"] + shelf["cached"] == shelf["size"]
    assert shelf["pinned"] == shelf["leased"] == 0


@dataclass
class Outcome:
    """What one streaming client saw: the status, its events, and whether the stream ended as it should."""

    status: int
    events: list[dict[str, Any]]
    done: bool

    @property
    def text(self) -> str:
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", []))

    @property
    def error(self) -> dict[str, Any] | None:
        return next((event["error"] for event in self.events if "error" in event), None)


async def stream(url: str, body: dict[str, Any], leave_after: int | None = None) -> Outcome:
    """POST a streamed completion over a connection of its own; go away after so many events if told to."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps({**body, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    outcome = Outcome(0, [], False)
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        outcome.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                outcome.done = True
            elif line.startswith(b"data: "):
                outcome.events.append(json.loads(line[6:]))
                if len(outcome.events) == leave_after:
                    return outcome
            elif line.startswith(b'{"error"'):
                outcome.events.append(json.loads(line))
    finally:
        writer.close()
    return outcome


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
