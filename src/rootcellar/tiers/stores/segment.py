"""One file of the file store: slots of one size for one identity, and before them what is in each.

    block 0       a line with the format, a line of JSON (identity, slot_bytes, slots), zeros; last, 8 bytes that
                  count changes
    entries       64 bytes a slot: name, checksum, when put, when last used (ns since 1970), length; to a whole block
    slots         ``slot_bytes`` each: an image and zeros

All numbers are little-endian. An entry whose length is 0 is free. An image is written before its entry, and an entry is
cleared before its slot is written again, so what a killed process leaves findable is whole: what it wrote is in the
system's cache. After a power cut an entry may be there and its image not, which the checksum shows; it begins with the
format, the name and the length, so none of them can be another's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from rootcellar.tiers.stores.slotio import BLOCK, Medium, round_up

FORMAT = 1
"""Of files. What is written under one format is never read under another."""
SUFFIX = ".pages"
_MAGIC = b"rootcellar pages %d\n"
_COUNTER = BLOCK - 8
ENTRY = np.dtype([("name", "V32"), ("checksum", "<u8"), ("made", "<u8"), ("used", "<u8"), ("length", "<u8")])
Entries = NDArray[np.void]
_FREE = np.zeros((), ENTRY)


class UnreadableSegment(Exception):
    """This file is none of this format's; the message says why."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a segment says of itself; ``identity``: of the engine whose pages these are, as text."""

    identity: str
    slot_bytes: int
    slots: int

    @property
    def first_slot(self) -> int:
        """The byte where slot 0 begins."""
        return BLOCK + round_up(self.slots * ENTRY.itemsize)

    @property
    def file_bytes(self) -> int:
        """The whole file."""
        return self.first_slot + self.slots * self.slot_bytes


def slots_within(nbytes: int, slot_bytes: int) -> int:
    """How many slots a file of about ``nbytes`` has; at least one."""
    return max(1, (nbytes - 2 * BLOCK) // (slot_bytes + ENTRY.itemsize))


def seed_of(name: bytes, length: int) -> int:
    """What the checksum of an image begins with."""
    return int(xxhash.xxh3_64_intdigest(name, FORMAT << 56 ^ length))


class Segment:
    """An open file. Nothing here is locked; whoever holds it does that."""

    def __init__(self, path: Path, head: Head, fd: int, medium: Medium, writable: bool = True) -> None:
        """Of an open ``fd``; see :meth:`create` and :meth:`open`."""
        self.path = path
        self.head = head
        self.medium = medium
        self.entries: Entries = np.zeros(head.slots, ENTRY)
        self.users = 0
        """Calls that are reading or writing images. The file is closed when the last has gone."""
        self.retired = False
        self.restamped = False
        """Whether the times of use have changed since they were written."""
        self._changes = 0
        self._fd = fd
        access = os.O_RDWR if writable else os.O_RDONLY
        self.images = os.open(path, access | medium.flags) if medium.flags else fd
        """The file descriptor to read and write slots with."""

    @classmethod
    def create(cls, path: Path, head: Head, medium: Medium) -> Segment:
        """A new file with all its room. Raises ``OSError``: there is no such room (and then no such file)."""
        fresh = path.with_suffix(".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _allocate(fd, head.file_bytes)
            said = {"identity": head.identity, "slot_bytes": head.slot_bytes, "slots": head.slots}
            os.pwrite(fd, _MAGIC % FORMAT + json.dumps(said).encode() + b"\n", 0)
            fresh.replace(path)
            segment = cls(path, head, fd, medium)
        except OSError:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        return segment

    @classmethod
    def open(cls, path: Path, medium: Medium, writable: bool) -> Segment:
        """Open a file. Raises ``OSError``, or ``UnreadableSegment`` when it is not one of this format."""
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            head = read_head(fd)
            segment = cls(path, head, fd, medium, writable)
        except (OSError, UnreadableSegment):
            os.close(fd)
            raise
        segment.reload()
        return segment

    def changed(self) -> bool:
        """Whether another process has changed the entries since they were read."""
        return self._read_changes() != self._changes

    def reload(self) -> None:
        """Read the entries again."""
        self._changes = self._read_changes()  # first: what changes while they are read is read again the next time
        raw = os.pread(self._fd, self.entries.nbytes, BLOCK)
        raw += bytes(self.entries.nbytes - len(raw))  # of a file that was cut short
        self.entries = np.frombuffer(raw, ENTRY).copy()

    def valid(self) -> NDArray[np.intp]:
        """The slots whose entries can be of an image, ascending."""
        length = self.entries["length"]
        return np.flatnonzero((length > 0) & (length <= self.head.slot_bytes))

    def names(self, slots: NDArray[np.intp]) -> list[bytes]:
        """What lies in these slots is called."""
        raw = self.entries["name"][slots].tobytes()
        return [raw[i : i + 32] for i in range(0, len(raw), 32)]

    def last_used(self) -> int:
        """When any of its pages was (ns since 1970), 0 when it has none."""
        slots = self.valid()
        return int(self.entries["used"][slots].max()) if len(slots) else 0

    def offset(self, slot: int) -> int:
        """The byte where a slot begins."""
        return self.head.first_slot + slot * self.head.slot_bytes

    def sync(self) -> None:
        """Wait until all that was written is on the medium."""
        os.fdatasync(self._fd)

    def write(self, slots: Sequence[int], entries: Entries) -> None:
        """Make what lies in ``slots``, ascending, findable."""
        self._replace(slots, entries)

    def clear(self, slots: Sequence[int]) -> None:
        """What lies in ``slots``, ascending, is no longer findable."""
        self._replace(slots, _FREE)

    def touch(self, slots: Sequence[int], stamp: int) -> None:
        """What lies in ``slots`` was used at ``stamp``, which :meth:`stamp` writes down."""
        self.entries["used"][slots] = stamp
        self.restamped = True

    def stamp(self) -> None:
        """Write when pages were last used, where that has changed."""
        if self.restamped:
            self._write_entries(0, self.head.slots)
            self.restamped = False

    def remove(self) -> None:
        """Take the file away, with all that is in it; :meth:`close` frees its room."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self.images != self._fd:
            os.close(self.images)
        os.close(self._fd)

    def _replace(self, slots: Sequence[int], entries: Entries) -> None:
        start = 0
        for i in range(1, len(slots) + 1):
            if i == len(slots) or slots[i] != slots[i - 1] + 1:
                self.entries[slots[start] : slots[i - 1] + 1] = entries[start:i] if entries.shape else entries
                self._write_entries(slots[start], slots[i - 1] + 1)
                start = i
        self._changes = (self._changes + 1) % (1 << 64)
        os.pwrite(self._fd, self._changes.to_bytes(8, "little"), _COUNTER)

    def _write_entries(self, start: int, stop: int) -> None:
        os.pwrite(self._fd, self.entries[start:stop].tobytes(), BLOCK + start * ENTRY.itemsize)

    def _read_changes(self) -> int:
        return int.from_bytes(os.pread(self._fd, 8, _COUNTER), "little")


def _allocate(fd: int, nbytes: int) -> None:
    if sys.platform == "linux":
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)


def read_head(fd: int) -> Head:
    """The head of an open file. Raises ``UnreadableSegment``, or ``OSError``."""
    block = os.pread(fd, BLOCK, 0)
    first, _, rest = block.partition(b"\n")
    if first + b"\n" != _MAGIC % FORMAT:
        raise UnreadableSegment(f"it begins with {first[:32]!r}, not with {(_MAGIC % FORMAT)!r}")
    try:
        said = json.loads(rest.partition(b"\n")[0])
        head = Head(str(said["identity"]), int(said["slot_bytes"]), int(said["slots"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableSegment(f"its head cannot be read: {error!r}") from None
    if head.slots < 1 or head.slot_bytes < BLOCK or head.slot_bytes % BLOCK:
        raise UnreadableSegment(f"its head makes no sense: {head}")
    if os.fstat(fd).st_size < head.first_slot:
        raise UnreadableSegment(f"it has {os.fstat(fd).st_size} bytes, too few for its {head.slots} entries")
    return head
