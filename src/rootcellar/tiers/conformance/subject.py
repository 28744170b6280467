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

_STARTING = 60.0


class ServerProcess:
    """A process that serves a store, and dies and stops when it is told to."""

    def __init__(self, command: Sequence[str], log: Path, answers: Callable[[], None]) -> None:
        """Not running yet. ``answers`` raises unless it is there; what it says goes into ``log``."""
        self._command, self._log, self._answers = list(command), log, answers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers. Raises ``RuntimeError`` with its log when it does not within a minute."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + _STARTING
        while True:
            try:
                return self._answers()
            except Exception as error:
                if self._process.poll() is not None or time.monotonic() > until:
                    self.kill()
                    said = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise RuntimeError(f"{self._command[0]} does not serve ({error!r}):\n{said}") from error
            time.sleep(0.05)

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
