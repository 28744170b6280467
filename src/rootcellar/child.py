"""A process beside this one, for what could hurt it or hold it up: one message after the other, and an answer to each.

It runs ``main`` of a module, which takes :func:`parent` and serves it until that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from rootcellar.errors import EngineError

_START_SECONDS = 120
# With our own search path, so that it finds the same packages; `-m` would look for them anew.
_PROGRAM = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2]).main()"
)


class Child:
    """One process at a time, started when first needed and again when it ended; for one thread, but for ``stop``."""

    def __init__(self, module: str, task: str, first: Any) -> None:
        """Of ``module``, which is sent ``first`` to begin with and answers; ``task``: what it does, for errors."""
        self._module = module
        self._task = task
        self._first = first
        self._lock = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._said: IO[bytes] | None = None

    def connection(self) -> Connection:
        """Of a process that runs; started first if need be.

        Raises:
            EngineError: it does not start, and the message has its last words; or it was stopped.
        """
        if self._process is not None and self._process.poll() is None and self._connection is not None:
            return self._connection
        self.close()
        ours, theirs = Pipe()
        self._connection, self._said = ours, tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), self._module, str(theirs.fileno())]
        try:
            with theirs, self._lock:
                if self._stopped:
                    raise EngineError(f"the process that {self._task} was stopped")
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._said,
                    stderr=self._said,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a Ctrl-C is our own affair
                )
            ours.send(self._first)
            if not ours.poll(_START_SECONDS):
                raise OSError(f"not ready after {_START_SECONDS} seconds")
            ours.recv()
        except (EOFError, OSError) as error:
            words = self.said()
            self.close()
            raise EngineError(f"the process that {self._task} does not start: {words[-500:] or error}") from error
        return ours

    def said(self) -> str:
        """What the process wrote to its outputs, 4,096 bytes at most."""
        if self._said is None:
            return ""
        self._said.seek(0)
        return self._said.read(4096).decode(errors="replace").strip()

    def status(self) -> int:
        """How a process that is about to end did: its exit status, or minus the signal; 0 if it does not end."""
        assert self._process is not None
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return 0

    def stop(self) -> None:
        """End the process and start no other, from any thread: whoever waits for it sees that at once."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, if there is one, and leave nothing of it behind."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._said is not None:
            self._said.close()
        self._process = self._connection = self._said = None


def parent() -> Connection:
    """In the child: the way to its parent, which goes first in the machine's queue."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)
    return Connection(int(sys.argv[-1]))


def may_take(more: int) -> None:
    """In the child: let it map so many bytes beside what it has mapped already, where the system says how many."""
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        mapped = 2**46
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.RLIM_INFINITY))


def give_back() -> None:
    """In the child: let the system have what a large job has left behind, where its allocator can be told."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
