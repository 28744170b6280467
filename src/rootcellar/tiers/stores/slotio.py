"""Images between memory and slots of a file, with their checksums: buffered or direct, several slots at a time.

Slots are ``stride`` bytes apart, a multiple of ``BLOCK``, and begin at multiples of it, so writing one never makes the
system read what it overwrites. A checksum is computed once the bytes were copied, while they are in the processor's
caches (XXH3 takes 15 GB/s there and 10 from memory), so buffered transfers go in pieces: ``READ_PIECE`` fits the near
ones, ``WRITE_PIECE`` the last, since each write costs the system time of its own. Others (``O_DIRECT``) go past
its cache: the longer a piece, the better; memory that is not aligned for them is copied once more.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

BLOCK = 4096
"""Bytes: what direct transfers are aligned to, and pages of the system's cache."""
READ_PIECE = 1 << 18
WRITE_PIECE = 1 << 21
DIRECT_PIECE = 1 << 23
_MOST_IMAGES = 256
"""Of a run: two parts each, and a system call takes 1,024 at most."""
_ZEROS = bytes(BLOCK)


def round_up(nbytes: int) -> int:
    """``nbytes`` to a whole number of blocks."""
    return -(-nbytes // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class Run:
    """Images in adjacent slots: ``views[i]``, bytes, lies in slot ``slot + i``; ``seeds[i]`` begins its checksum."""

    slot: int
    views: Sequence[memoryview]
    seeds: Sequence[int]


def runs(slots: Sequence[int], views: Sequence[memoryview], seeds: Sequence[int], piece: int) -> list[Run]:
    """Images in ascending ``slots`` as runs of at most ``piece`` bytes, or of one image."""
    found: list[Run] = []
    start = size = 0
    for i in range(len(slots) + 1):
        full = i < len(slots) and (size + len(views[i]) > piece or i - start == _MOST_IMAGES)
        if i > start and (i == len(slots) or slots[i] != slots[i - 1] + 1 or full):
            found.append(Run(slots[start], views[start:i], seeds[start:i]))
            start, size = i, 0
        if i < len(slots):
            size += len(views[i])
    return found


class Buffered:
    """Transfers through the system's cache."""

    read_piece, write_piece = READ_PIECE, WRITE_PIECE
    flags = 0

    def read(self, fd: int, at: int, stride: int, run: Run) -> list[int | None]:
        """Fill the views from the slots, the first of which begins at byte ``at``.

        Returns their checksums; None where the file ends before. Raises ``OSError``.
        """
        if len(run.views) > 1:
            gap = memoryview(bytearray(BLOCK))
            parts = [part for view in run.views for part in (view, gap[: stride - len(view)])][:-1]
            if os.preadv(fd, parts, at) == sum(map(len, parts)):
                pairs = zip(run.views, run.seeds, strict=True)
                return [xxhash.xxh3_64_intdigest(view, seed) for view, seed in pairs]
        triples = enumerate(zip(run.views, run.seeds, strict=True))
        return [_read_one(fd, at + i * stride, view, seed) for i, (view, seed) in triples]

    def write(self, fd: int, at: int, stride: int, run: Run) -> list[int]:
        """Write the views into the slots, the first of which begins at byte ``at``; returns their checksums."""
        if len(run.views) == 1 and len(run.views[0]) > WRITE_PIECE:
            return [_write_one(fd, at, stride, run.views[0], run.seeds[0])]
        _write_all(fd, at, [part for view in run.views for part in (view, _ZEROS[: stride - len(view)])])
        return [xxhash.xxh3_64_intdigest(view, seed) for view, seed in zip(run.views, run.seeds, strict=True)]


class _Bounce(threading.local):
    """Aligned memory, each thread's own."""

    memory = memoryview(b"")


class Unbuffered:
    """Transfers past the system's cache."""

    read_piece = write_piece = DIRECT_PIECE
    flags = os.O_DIRECT if sys.platform == "linux" else 0

    def __init__(self) -> None:
        self._bounced = _Bounce()

    def read(self, fd: int, at: int, stride: int, run: Run) -> list[int | None]:
        """As :meth:`Buffered.read`."""
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
        """As :meth:`Buffered.write`."""
        aligned = all(len(view) == stride and _address(view) % BLOCK == 0 for view in run.views)
        parts = list(run.views) if aligned else self._bounce(stride, len(run.views))
        if not aligned:
            for view, part in zip(run.views, parts, strict=True):
                part[: len(view)] = view
                part[len(view) :] = _ZEROS[: stride - len(view)]
        _write_all(fd, at, parts)
        return [xxhash.xxh3_64_intdigest(view, seed) for view, seed in zip(run.views, run.seeds, strict=True)]

    def _bounce(self, stride: int, count: int) -> list[memoryview]:
        """Aligned memory of this thread for ``count`` slots."""
        memory = self._bounced.memory
        if len(memory) < stride * count:
            memory = self._bounced.memory = memoryview(mmap.mmap(-1, stride * count))
        return [memory[i * stride : (i + 1) * stride] for i in range(count)]


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
        at += done
        while rest and done >= len(rest[0]):
            done -= len(rest.pop(0))
        if done:
            rest[0] = rest[0][done:]
