"""The process that tries a grammar first: what kills it is refused, and kills nothing else.

It reads messages from a connection until that ends: first what the model's tokens are, then grammars.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from rootcellar.child import parent
from rootcellar.grammars.compiling import Vocabulary, matcher, translate

# Less than any thread of the engine's process has: what fits here fits there.
STACK_BYTES = 4 * 2**20
MEMORY_BYTES = 128 * 2**20
"""What one grammar may take."""


def serve(connection: Connection) -> None:
    """Answer until the other side is gone.

    In: ``(tokenizer, size, eos)``, then ``(kind, source, depth, close_objects, seconds)`` again and again. Out, for
    each: ``(llguidance's form, bytes that it took, None)`` or ``("", 0, what is wrong)``.
    """
    vocabulary = Vocabulary(*connection.recv())
    words = vocabulary.read()
    connection.send(None)
    while True:
        try:
            kind, source, depth, close_objects, seconds = connection.recv()
        except EOFError:
            return
        # Should the engine's process be gone meanwhile, nobody else would end this one.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
        before = _grant_memory()
        try:
            grammar = translate(kind, source, vocabulary, depth=depth, close_objects=close_objects)
            matcher(words, grammar)
            answer = grammar, max(0, _memory()[1] - before), None
        except Exception as error:  # the converters raise what they like
            answer = "", 0, str(error) or type(error).__name__
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _memory() -> tuple[int, int]:
    """Bytes of this process: its address space, and what of it is in memory; zeros where the system does not say."""
    try:
        total, resident, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0, 0
    page = resource.getpagesize()
    return int(total) * page, int(resident) * page


def _grant_memory() -> int:
    """Let the process grow by ``MEMORY_BYTES`` from now on; what it has in memory."""
    total, resident = _memory()
    if total:
        resource.setrlimit(resource.RLIMIT_AS, (total + MEMORY_BYTES, resource.RLIM_INFINITY))
    return resident


def main() -> None:
    """Serve the process that began this one."""
    connection = parent()
    run_on_stack(STACK_BYTES, lambda: serve(connection))


def run_on_stack(size: int, function: Callable[[], None]) -> None:
    """Call ``function`` on a thread that has a stack of ``size`` bytes, and wait for its end."""
    before = threading.stack_size(size)
    thread = threading.Thread(target=function)
    thread.start()
    threading.stack_size(before)
    thread.join()
