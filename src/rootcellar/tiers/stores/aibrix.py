"""AIBrix's KV cache, in a process of its own: what it needs (torch, its own numpy) never comes into this one.

The process is started with the store and again when it died, and ends with it. It keeps pages in a folder that engines
share (``SHFS``) or in a RocksDB of its own (``ROCKSDB``).
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import nothing_else, take_choice, take_text
from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.wire import Address, Wire, Wires

_HEAD = struct.Struct("<cI")
_PAGE = struct.Struct("<32sQ")
_T = TypeVar("_T")
_SIDECAR = Path(__file__).with_name("aibrix_sidecar.py")


@dataclass(frozen=True, slots=True)
class AibrixSettings:
    """Of a store on AIBrix's KV cache."""

    python: str
    """The interpreter of the environment that has ``aibrix-kvcache``."""
    path: Path
    """The folder of its pages."""
    l2: str = "SHFS"
    """AIBrix's connector: ``SHFS`` or ``ROCKSDB``."""
    start_timeout: float = 120.0
    """Seconds that it may take to start; it imports torch."""
    timeout: float = 5.0
    """Seconds without a byte after which a call is given up."""


def read_settings(extra: Mapping[str, object]) -> AibrixSettings:
    """What ``--hicache-storage-backend-extra-config`` says of it. Raises ``ConfigError``."""
    own = dict(extra)
    settings = AibrixSettings(
        python=take_text(own, "python"),
        path=Path(take_text(own, "path")).expanduser(),
        l2=take_choice(own, "l2", ("SHFS", "ROCKSDB"), "SHFS"),
        start_timeout=positive(own, "start_timeout", 120.0),
        timeout=positive(own, "timeout", 5.0),
    )
    nothing_else(own, "aibrix", "python, path, l2, start_timeout, timeout")
    if shutil.which(settings.python) is None:
        raise ConfigError(
            f"python={settings.python!r} is not there: make an environment, and in it pip install aibrix-kvcache"
        )
    return settings


class AibrixStore:
    """A :class:`~rootcellar.tiers.store.Store` in AIBrix's process."""

    verifies = False

    def __init__(self, settings: AibrixSettings) -> None:
        """Raises ``ConfigError``: AIBrix does not start."""
        self.settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="rootcellar-")
        self._lock = threading.Lock()
        self._started = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._wires: Wires | None = None
        self._closed = False
        try:
            self._wires = self._start()
        except OSError as error:
            self.close()
            raise ConfigError(f"the aibrix store cannot be used: {error}") from None

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)

        def ask(wire: Wire) -> list[bool]:
            wire.send([_said(b"h", names, [0] * len(names))])
            return _answers(wire, len(names))

        return self._run(ask)

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)
        views = [view.cast("B") for view in into]

        def ask(wire: Wire) -> list[bool]:
            wire.send([_said(b"g", names, [len(view) for view in views])])
            found: list[bool] = []
            for view in views:
                found.append(wire.exactly(1) == b"\x01")  # it fails for pages of another length: that is a miss
                if found[-1]:
                    wire.into(view)
            return found

        return self._run(ask)

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, blocks)

        def give(wire: Wire) -> list[bool]:
            wire.send([_said(b"p", names, [block.nbytes for block in blocks]), *blocks])
            return _answers(wire, len(names))

        return self._run(give)

    def clear(self) -> int:
        """See ``Store``. Raises ``OSError``."""

        def ask(wire: Wire) -> int:
            wire.send([_said(b"c", [], [])])
            return int.from_bytes(wire.exactly(8), "little")

        return self._run(ask)

    def register(self, _buffer: memoryview) -> None:
        """Nothing comes of it."""

    def close(self) -> None:
        """See ``Store``: ends the process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._end()
            self._folder.cleanup()

    # --- the process --------------------------------------------------------------------------------------------------

    def _run(self, call: Callable[[Wire], _T]) -> _T:
        with self._lock:
            if self._closed:
                raise ValueError("the store is closed")
            if self._wires is None or self._process is None or self._process.poll() is not None:
                self._wires = self._start()
            wires = self._wires
        return wires.run(call)

    def _start(self) -> Wires:
        """Start it and wait until it listens. Raises ``OSError`` with what it said where it does not."""
        self._end()
        self._started += 1
        at = Path(self._folder.name, f"socket{self._started}")
        log = Path(self._folder.name, f"log{self._started}")
        settings = self.settings
        with log.open("wb") as said:
            # Isolated: else this folder is searched first, and our redis.py taken for theirs.
            self._process = subprocess.Popen(
                [settings.python, "-I", str(_SIDECAR), str(at), settings.l2, str(settings.path)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
            )
        wires = Wires(Address(path=str(at), timeout=settings.timeout))
        until = time.monotonic() + settings.start_timeout
        while True:
            try:
                wires.run(lambda wire: wire.send([_said(b"h", [], [])]))
            except OSError:
                if self._process.poll() is None and time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                self._end()
                raise OSError(f"AIBrix did not start: {log.read_text(errors='replace')[-1000:].strip()}") from None
            return wires

    def _end(self) -> None:
        if self._wires is not None:
            self._wires.close()
            self._wires = None
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None


def _said(verb: bytes, names: Sequence[bytes], lengths: Sequence[int]) -> bytes:
    pages = b"".join(_PAGE.pack(name, length) for name, length in zip(names, lengths, strict=True))
    return _HEAD.pack(verb, len(names)) + pages


def _answers(wire: Wire, count: int) -> list[bool]:
    answers = wire.exactly(count)
    if 2 in answers:
        raise OSError(f"AIBrix failed for {answers.count(2)} of {count} pages")
    return [answer == 1 for answer in answers]


def open_store(extra: Mapping[str, object], _identity: str) -> AibrixStore:
    """See ``registry``."""
    return AibrixStore(read_settings(extra))
