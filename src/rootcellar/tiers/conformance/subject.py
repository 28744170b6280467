"""What the suite tests: a store that can be opened again and again, and the server behind it where there is one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rootcellar.tiers.store import Store

_STARTING = 90.0
"""Seconds: more than those for which the system keeps the port of a server that was killed."""


class ServerProcess:
    """A process that serves a store, and dies and stops when it is told to."""

    def __init__(self, command: Sequence[str], log: Path, answers: Callable[[], None]) -> None:
        """Not running yet. ``answers`` raises unless it is there; what it says goes into ``log``."""
        self._command, self._log, self._answers = list(command), log, answers
        self._process: subprocess.Popen[bytes] | None = None
        self._ran = False

    def start(self) -> None:
        """Start it and wait until it answers. Raises ``RuntimeError`` with its log when it does not.

        One that ran before and ends at once is started again: its port may not be free yet.
        """
        until = time.monotonic() + _STARTING
        self._process = self._begin()
        while True:
            try:
                self._answers()
            except Exception as error:
                ended = self._process.poll() is not None
                if time.monotonic() > until or (ended and not self._ran):
                    self.kill()
                    said = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise RuntimeError(f"{self._command[0]} does not serve ({error!r}):\n{said}") from error
                time.sleep(1.0 if ended else 0.05)
                self._process = self._begin() if ended else self._process
            else:
                self._ran = True
                return

    def _begin(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """``kill -9``, of whatever it started too."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Meanwhile it does nothing: connections to it are accepted, and nothing is answered."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, which: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, which)


@dataclass(frozen=True)
class Subject:
    """One kind of store over one medium, which is empty when a test begins."""

    open: Callable[[], Store]
    """A client; each has all that the others put."""
    open_second: Callable[[], Store]
    """A client beside the first one: another one of the same, or one that only reads."""
    server: ServerProcess | None = None
    deletes: bool = True
    """Whether its medium can delete anything at all."""
    sees_ends: bool = True
    """Whether it sees that an object is longer than what is asked for; else the page in front is a hit."""
