"""The worker's process as the engine holds it: started when first needed, and again after a grammar has killed it."""

from __future__ import annotations

import logging
import signal
from dataclasses import astuple, dataclass

from rootcellar.child import Child
from rootcellar.errors import RequestError
from rootcellar.grammars.compiling import Vocabulary

log = logging.getLogger(__name__)


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
        self._bounds = bounds
        self._child = Child("rootcellar.grammars.worker", "compiles grammars", astuple(vocabulary))

    def try_out(self, kind: str, source: str, seconds: float) -> tuple[str, int]:
        """``source`` in llguidance's form, which compiles, and the bytes that it takes.

        ``seconds``: how long it may take; starting the process does not count.

        Raises:
            RequestError: it is no grammar, too deep, or takes too long or too much; the process may have died of it.
            EngineError: the process does not start; the message has its last words.
        """
        connection = self._child.connection()
        try:
            connection.send((kind, source, self._bounds.depth, self._bounds.close_objects, seconds))
            if not connection.poll(seconds):
                self._child.close()
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

    def _died(self, kind: str) -> str:
        """What to say when the process ended over a grammar."""
        code = self._child.status()
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        log.warning("the process that compiles grammars died of a request's %s (%s)", kind, name)
        self._child.close()
        return (
            f"{kind} is refused: compiling it ended its process ({name}), for want of stack or memory; make it smaller "
            "or less nested"
        )

    def stop(self) -> None:
        """End the process for good, from any thread: whoever waits for it sees that at once."""
        self._child.stop()

    def close(self) -> None:
        """End the process, if there is one, and leave nothing of it behind."""
        self._child.close()
