"""Writes a trace of what was asked, for ``rootcellar replay``: ids that only say which prompts begin alike, no text.

A line a request, in Mooncake's format, when it ends: ``timestamp`` (milliseconds since the engine began, when it first
ran), ``input_length`` and ``output_length`` in tokens, ``hash_ids`` (one for each block of the prompt) and
``output_hash_ids`` (of prompt and answer, from the prompt's first block that is not whole on, without the newest
token, which is never cached). An id is a keyed hash of all tokens up to the block's end and the namespace. The key is
drawn when the engine starts and written nowhere, so an id says nothing to whoever has the trace, nor does it equal
another run's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import threading
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ConfigError

log = logging.getLogger(__name__)

_WAITING = 4096
"""Requests that may wait to be written; more are left out, and how many is logged."""
_PATIENCE = 10.0
"""Seconds for writing what waits at the end, and again for the last line."""
_ID_BYTES = 7
"""Of an id: whole numbers up to 2^56, so that two of a billion blocks are equal once in a hundred traces at most."""


class TraceLine(NamedTuple):
    """One request that ended: its tokens, of which nobody writes any more, and what else a line says of it."""

    at: float
    ids: NDArray[np.int64]
    prompt_length: int
    namespace: str


class TraceLog:
    """Appends to one file, on a thread of its own."""

    def __init__(self, path: str, block: int) -> None:
        """``block``: tokens of an id. Raises ``ConfigError`` where the file cannot be written."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK  # a pipe that nobody reads is no place for it
        try:
            self._file = os.fdopen(os.open(path, flags, 0o600), "w", encoding="ascii")
        except OSError as error:
            raise ConfigError(f"record_trace={path!r} cannot be written: {error.strerror}") from None
        self._path = Path(path)
        self._block = block
        self._key = secrets.token_bytes(32)
        self._left_out = 0
        self._queue: queue.Queue[TraceLine | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="rootcellar-trace", daemon=True)
        self._begun = False

    def ended(self, asked: TraceLine) -> None:
        """Write of a request, soon; called from the engine's thread, and never waits."""
        if not self._begun:
            self._begun = True
            self._thread.start()
        try:
            self._queue.put_nowait(asked)
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Write what waits, and end; a disk that hangs is waited for no longer than ``_PATIENCE``."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=_PATIENCE)
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                log.error("the trace %s may lack its end: its disk does not answer", self._path)
        elif not self._begun:
            self._file.close()
        if self._left_out:
            log.warning("%d requests are not in the trace %s: it was not written in time", self._left_out, self._path)
            self._left_out = 0

    def _run(self) -> None:
        try:
            with self._file as file:
                while (asked := self._queue.get()) is not None:
                    file.write(json.dumps(self._line(asked), separators=(",", ":")) + "\n")
                    if self._queue.empty():
                        file.flush()
        except OSError as error:
            log.error("the trace %s ends here: %s", self._path, error)
            while asked is not None:  # nobody must wait for a place in the line, nor for the end where that was taken
                asked = self._queue.get()

    def _line(self, asked: TraceLine) -> dict[str, object]:
        ids, n = asked.ids, asked.prompt_length
        whole = n - n % self._block
        begun, chain = self._hashes(ids[:whole], asked.namespace.encode("utf-8", "surrogatepass"))
        rest, _ = self._hashes(ids[whole:n], chain)
        after, _ = self._hashes(ids[whole : max(n, len(ids) - 1)], chain) if len(ids) > n else ([], b"")
        return {
            "timestamp": round(1e3 * asked.at, 3),
            "input_length": n,
            "output_length": len(ids) - n,
            "hash_ids": begun + rest,
            "output_hash_ids": after,
        }

    def _hashes(self, ids: NDArray[np.int64], chain: bytes) -> tuple[list[int], bytes]:
        """The ids of blocks that follow what ``chain`` stands for, and what stands for them all."""
        found = []
        for at in range(0, len(ids), self._block):
            content = np.ascontiguousarray(ids[at : at + self._block], "<i8").tobytes()
            chain = blake2b(len(chain).to_bytes(4, "little") + chain + content, key=self._key, digest_size=32).digest()
            found.append(int.from_bytes(chain[:_ID_BYTES], "little"))
        return found, chain
