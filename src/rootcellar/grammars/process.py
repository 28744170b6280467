"""The worker's process as the engine holds it: started when first needed, and again after a grammar has killed it."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO

from rootcellar.errors import EngineError, RequestError
from rootcellar.grammars.compiling import Vocabulary

log = logging.getLogger(__name__)

_START_SECONDS = 120
# With our own search path, so that it finds the same packages; `-m` would look for them anew.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rootcellar.grammars import worker; worker.main()"
)


@dataclass(frozen=True)
class Bounds:
    """What a grammar may be: characters, levels, seconds of compiling; ``close_objects``: see ``schemas.closed``."""

    length: int
    depth: int
    seconds: float
    close_objects: bool


class Worker:
    """One process at a time, for one thread."""

    def __init__(self, vocabulary: Vocabulary, bounds: Bounds) -> None:
        self._vocabulary = vocabulary
        self._bounds = bounds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._said: IO[bytes] | None = None

    def try_out(self, kind: str, source: str, seconds: float) -> tuple[str, int]:
        """``source`` in llguidance's form, which compiles, and the bytes that it takes.

        ``seconds``: how long it may take; starting the process does not count.

        Raises:
            RequestError: it is no grammar, too deep, or takes too long or too much; the process may have died of it.
            EngineError: the process does not start; the message has its last words.
        """
        connection = self._start()
        try:
            connection.send((kind, source, self._bounds.depth, self._bounds.close_objects, seconds))
            if not connection.poll(seconds):
                self.close()
                raise RequestError(
                    f"{kind} takes more than the {self._bounds.seconds:g} seconds that a request has for compiling its "
                    "grammars: simplify it, or raise grammar_compile_timeout"
                )
            text, taken, wrong = connection.recv()
        except (EOFError, OSError):
            raise RequestError(self._died(kind)) from None
        if wrong is not None:
            raise RequestError(wrong if wrong.startswith(f"{kind} ") else f"{kind} is not understood: {wrong}")
        return text, taken

    def _start(self) -> Connection:
        if self._process is not None and self._process.poll() is None and self._connection is not None:
            return self._connection
        self.close()
        ours, theirs = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._said,
                    stderr=self._said,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a Ctrl-C is the engine's affair
                )
            self._connection = ours
            ours.send(astuple(self._vocabulary))
            if not ours.poll(_START_SECONDS):
                raise OSError(f"not ready after {_START_SECONDS} seconds")
            ours.recv()
        except (EOFError, OSError) as error:
            words = self._last_words()
            ours.close()
            self.close()
            raise EngineError(f"the process that compiles grammars does not start: {words or error}") from error
        return ours

    def _last_words(self) -> str:
        assert self._said is not None
        self._said.seek(0)
        return self._said.read()[-500:].decode(errors="replace").strip()

    def _died(self, kind: str) -> str:
        """What to say when the process ended over a grammar."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        log.warning("the process that compiles grammars died of a request's %s (%s)", kind, name)
        self.close()
        return (
            f"{kind} is refused: compiling it ended its process ({name}), for want of stack or memory; make it smaller "
            "or less nested"
        )

    def kill(self) -> None:
        """End the process, from any thread: whoever waits for it sees that at once."""
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
