"""Images between memory and slots of a file, with their checksums: buffered or direct, several slots at a time.

Slots are ``stride`` bytes apart, a multiple of ``BLOCK``, and begin at multiples of it, so writing one never makes the
system read what it overwrites. Each medium is here twice, with the same results. C++ (``native/slots.cc``) passes over
memory once less: it sums up what it copies while it is in the near caches of the processor, and Python's lock is free
meanwhile. ``ByPython`` is slow and plain, and does the work where that was not built, and of runs with small images.

Direct transfers (``O_DIRECT``) go past the system's cache: the longer a piece, the better. Several pieces of a call are
under way at once.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import xxhash

from rootcellar.tiers import NATIVE

if TYPE_CHECKING or NATIVE:
    from rootcellar.tiers import _slots

BLOCK = 4096
"""Bytes: what direct transfers are aligned to, and pages of the system's cache."""
READ_PIECE = 1 << 18
"""Of a buffered read: what fits into a core's own cache, and costs little beside the system call."""
WRITE_PIECE = 1 << 19
DIRECT_PIECE = 1 << 22
RUN = 1 << 23
"""Bytes of images that are handed to C++ at once, about."""
COPIES, DIRECT = 2, 4
"""Transfers of one call that are under way at once. Buffered ones are copies: each keeps a processor busy."""
_MOST_IMAGES = 256
"""Of a run: two parts each, and a system call takes 1,024 at most."""
_SHORTEST = 241
"""Bytes of an image that C++ sums up."""
_ZEROS = bytes(BLOCK)
_T = TypeVar("_T")


def round_up(nbytes: int) -> int:
    """``nbytes`` to a whole number of blocks."""
    return -(-nbytes // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class Run:
    """Images in adjacent slots: ``views[i]``, bytes, lies in slot ``slot + i``; ``seeds[i]`` begins its checksum.

    ``rows[i]``: what whoever asks calls it.
    """

    slot: int
    views: Sequence[memoryview]
    seeds: Sequence[int]
    rows: Sequence[int]


def runs(
    slots: Sequence[int],
    views: Sequence[memoryview],
    seeds: Sequence[int],
    rows: Sequence[int],
    stride: int,
    piece: int,
) -> list[Run]:
    """Images in ascending ``slots`` as runs of at most ``piece`` bytes, or of one image."""
    most = max(1, min(piece // stride, _MOST_IMAGES))
    cuts = [0]
    for i in range(1, len(slots)):
        if slots[i] != slots[i - 1] + 1 or i - cuts[-1] == most:
            cuts.append(i)
    cuts.append(len(slots))
    return [Run(slots[i], views[i:j], seeds[i:j], rows[i:j]) for i, j in pairwise(cuts) if j > i]


class Medium(Protocol):
    """How images get into a file and back."""

    @property
    def flags(self) -> int:
        """To open the file with, beside the usual ones."""
        ...

    @property
    def run(self) -> int:
        """Bytes of a run, at most."""
        ...

    @property
    def in_flight(self) -> int:
        """How many runs of one call are transferred at once."""
        ...

    def read(self, fd: int, at: int, stride: int, run: Run) -> list[int | None]:
        """Fill the views from the slots, the first of which begins at byte ``at``.

        Returns their checksums; None where the file ends before. Raises ``OSError``: nothing could be read.
        """
        ...

    def write(self, fd: int, at: int, stride: int, run: Run) -> list[int]:
        """Write the views into the slots, the first of which begins at byte ``at``; returns their checksums.

        Raises ``OSError``.
        """
        ...


def medium(direct: bool) -> Medium:
    """The fastest there is here."""
    slow = UnbufferedByPython() if direct else BufferedByPython()
    return Native(slow, direct) if NATIVE else slow


class Native:
    """Transfers by C++."""

    run = RUN

    def __init__(self, slow: Medium, direct: bool, vectors: str = "") -> None:
        """``slow``: what transfers images that are too small. ``vectors``: by name, for tests."""
        self.flags, self.in_flight = slow.flags, slow.in_flight
        self._slow, self._direct, self._vectors = slow, direct, vectors

    def read(self, fd: int, at: int, stride: int, run: Run) -> list[int | None]:
        """See ``Medium``."""
        if _small(stride, run):
            return self._slow.read(fd, at, stride, run)
        piece = DIRECT_PIECE if self._direct else READ_PIECE
        return _slots.read(fd, at, stride, list(run.views), run.seeds, piece, self._vectors)

    def write(self, fd: int, at: int, stride: int, run: Run) -> list[int]:
        """See ``Medium``."""
        if _small(stride, run):
            return self._slow.write(fd, at, stride, run)
        piece = DIRECT_PIECE if self._direct else WRITE_PIECE
        return _slots.write(fd, at, stride, list(run.views), run.seeds, piece, self._direct, self._vectors)


class BufferedByPython:
    """Transfers through the system's cache."""

    run = WRITE_PIECE
    flags = 0
    in_flight = min(COPIES, os.cpu_count() or 1)

    def read(self, fd: int, at: int, stride: int, run: Run) -> list[int | None]:
        """See ``Medium``."""
        if len(run.views) > 1:
            parts = _with_gaps(run.views, stride, memoryview(bytearray(BLOCK)))[:-1]
            if os.preadv(fd, parts, at) == (len(run.views) - 1) * stride + len(run.views[-1]):
                return [*map(xxhash.xxh3_64_intdigest, run.views, run.seeds)]
        triples = enumerate(zip(run.views, run.seeds, strict=True))
        return [_read_one(fd, at + i * stride, view, seed) for i, (view, seed) in triples]

    def write(self, fd: int, at: int, stride: int, run: Run) -> list[int]:
        """See ``Medium``."""
        if len(run.views) == 1 and len(run.views[0]) > WRITE_PIECE:
            return [_write_one(fd, at, stride, run.views[0], run.seeds[0])]
        _write_all(fd, at, _with_gaps(run.views, stride, memoryview(_ZEROS)))
        return [*map(xxhash.xxh3_64_intdigest, run.views, run.seeds)]


class _Bounce(threading.local):
    """Aligned memory, each thread's own."""

    memory = memoryview(b"")


class UnbufferedByPython:
    """Transfers past the system's cache."""

    run = DIRECT_PIECE
    flags = os.O_DIRECT if sys.platform == "linux" else 0
    in_flight = DIRECT

    def __init__(self) -> None:
        self._bounced = _Bounce()

    def read(self, fd: int, at: int, stride: int, run: Run) -> list[int | None]:
        """See ``Medium``."""
        aligned = all(len(view) == stride and _address(view) % BLOCK == 0 for view in run.views)
        parts = list(run.views) if aligned else self._bounce(stride, len(run.views))
        done = os.preadv(fd, parts, at)
        if not aligned:
            for view, part in zip(run.views, parts, strict=True):
                view[:] = part[: len(view)]
        whole = enumerate(zip(run.views, run.seeds, strict=True))
        return [
            xxhash.xxh3_64_intdigest(view, seed) if i * stride + len(view) <= done else None
            for i, (view, seed) in whole
        ]

    def write(self, fd: int, at: int, stride: int, run: Run) -> list[int]:
        """See ``Medium``."""
        aligned = all(len(view) == stride and _address(view) % BLOCK == 0 for view in run.views)
        parts = list(run.views) if aligned else self._bounce(stride, len(run.views))
        if not aligned:
            for view, part in zip(run.views, parts, strict=True):
                part[: len(view)] = view
                part[len(view) :] = _ZEROS[: stride - len(view)]
        _write_all(fd, at, parts)
        return [*map(xxhash.xxh3_64_intdigest, run.views, run.seeds)]

    def _bounce(self, stride: int, count: int) -> list[memoryview]:
        """Aligned memory of this thread for ``count`` slots."""
        memory = self._bounced.memory
        if len(memory) < stride * count:
            memory = self._bounced.memory = memoryview(mmap.mmap(-1, stride * count))
        return [memory[i * stride : (i + 1) * stride] for i in range(count)]


class Crew:
    """Threads that share the work of a call with the thread that makes it."""

    def __init__(self, others: int, name: str) -> None:
        """``others``: how many beside the caller, at most; they begin with the first call that has work for them."""
        self._others, self._name = others, name
        self._began = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def each(self, do: Callable[[_T], None], jobs: Sequence[_T]) -> None:
        """``do`` each of them, several at once. Those of another call are waited for by nobody.

        Raises what ``do`` raised first, when all are over.
        """
        helpers = min(self._others, len(jobs) - 1)
        if helpers <= 0:
            for job in jobs:
                do(job)
            return
        rest, done = deque(jobs), threading.Semaphore(0)
        errors: list[BaseException] = []

        def work() -> None:
            while rest:
                try:
                    job = rest.popleft()
                except IndexError:
                    return
                try:
                    do(job)
                except BaseException as error:
                    errors.append(error)
                finally:
                    done.release()

        self._begin()
        for _ in range(helpers):
            self._asked.put(work)
        work()
        for _ in jobs:
            done.acquire()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Let the threads end. Whoever still comes does it all alone."""
        with self._began:
            self._others = 0
            for _ in self._threads:
                self._asked.put(None)
            self._threads.clear()

    def _begin(self) -> None:
        with self._began:
            while len(self._threads) < self._others:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self) -> None:
        while work := self._asked.get():
            work()


def _small(stride: int, run: Run) -> bool:
    """Whether there is an image for Python: a small one, or one whose entry has a length that it cannot have."""
    least = min(map(len, run.views))
    return least < _SHORTEST or stride - least >= BLOCK


def _with_gaps(views: Sequence[memoryview], stride: int, gap: memoryview) -> list[memoryview]:
    """The images, and behind each what is left of its slot."""
    return [part for view in views for part in (view, gap[: stride - len(view)])]


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _read_one(fd: int, at: int, view: memoryview, seed: int) -> int | None:
    checksum = xxhash.xxh3_64(seed=seed)
    for start in range(0, len(view), READ_PIECE):
        piece = view[start : start + READ_PIECE]
        done = 0
        while done < len(piece):
            got = os.preadv(fd, [piece[done:]], at + start + done)
            if got == 0:
                return None
            done += got
        checksum.update(piece)
    return checksum.intdigest()


def _write_one(fd: int, at: int, stride: int, view: memoryview, seed: int) -> int:
    checksum = xxhash.xxh3_64(seed=seed)
    for start in range(0, len(view), WRITE_PIECE):
        piece = view[start : start + WRITE_PIECE]
        last = start + len(piece) == len(view)
        _write_all(fd, at + start, [piece, _ZEROS[: stride - len(view)]] if last else [piece])
        checksum.update(piece)
    return checksum.intdigest()


def _write_all(fd: int, at: int, parts: Sequence[memoryview | bytes]) -> None:
    """Write the parts one after the other from byte ``at`` on; a write may end early (a signal, a full disk)."""
    rest = [memoryview(part) for part in parts if len(part)]
    while rest:
        done = os.pwritev(fd, rest, at)
        if not done:  # it would be so again
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        at += done
        while rest and done >= len(rest[0]):
            done -= len(rest.pop(0))
        if done:
            rest[0] = rest[0][done:]
