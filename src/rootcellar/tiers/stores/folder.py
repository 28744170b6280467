"""The folder of a file store: who may write in it, which files it has, and how much room they may take.

A file belongs to one identity and one size of slot. All of them together stay within ``max_size``, and leave
``min_free_space`` of the file system to others. Where one has to go it is the one whose pages were not used for
longest, whoever put them: files of other identities, and of other formats, are told by their names' ending.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rootcellar.errors import ConfigError
from rootcellar.tiers.stores.segment import SUFFIX, Head, Segment, UnreadableSegment, slots_within
from rootcellar.tiers.stores.slotio import Medium

_FEW = 64
"""Files that a full store has, about: each is open all the time."""
_SMALLEST, _USUAL, _LARGEST = 1 << 20, 1 << 26, 1 << 36
_TICK = 10**9
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stranger:
    """A file of the folder that this store does not read: another identity's, another format's or a broken one."""

    path: Path
    file_bytes: int
    used: int
    """Last, in ns since 1970."""
    why: str
    """It is not read."""


class Folder:
    """The files below ``path``. The store that holds it locks."""

    def __init__(self, path: Path, identity: str, medium: Medium, writable: bool) -> None:
        """Open all files of ``identity``. Raises ``ConfigError``: no such folder, or somebody else writes in it."""
        self.path = path
        self.identity = identity
        self.segments: dict[Path, Segment] = {}
        self.strangers: dict[Path, Stranger] = {}
        self._medium = medium
        self._writable = writable
        self._lock = lock(path) if writable else None
        self._seen = -1
        if not writable and not path.is_dir():
            raise ConfigError(f"the store's path={str(path)!r} is no folder")
        if writable and medium.flags:
            _require(path, medium.flags)
        if writable:
            for unfinished in path.glob("*.new"):
                unfinished.unlink(missing_ok=True)
        self.rescan()

    def rescan(self) -> list[Segment]:
        """Find files that came or went since the last time; returns those that went, which the caller closes."""
        changed = self.path.stat().st_mtime_ns
        if changed == self._seen:
            return []
        # Two changes may fall into one tick of the file system's clock.
        self._seen = changed if time.time_ns() - changed > _TICK else -1
        there = set(self.path.glob("*" + SUFFIX))
        for path in sorted(there - self.segments.keys() - self.strangers.keys()):
            self._open(path)
        self.strangers = {path: stranger for path, stranger in self.strangers.items() if path in there}
        gone = [path for path in self.segments if path not in there]
        return [self.segments.pop(path) for path in gone]

    def create(self, slot_bytes: int, nbytes: int) -> Segment | None:
        """A new file of about ``nbytes``, or None where the file system has no room for it."""
        last = max((int(p.stem) for p in self.path.glob("*" + SUFFIX) if p.stem.isdecimal()), default=-1)
        path = self.path / f"{last + 1:08d}{SUFFIX}"
        head = Head(self.identity, slot_bytes, slots_within(nbytes, slot_bytes))
        try:
            segment = self.segments[path] = Segment.create(path, head, self._medium)
        except OSError as error:
            _log.warning("%s cannot be made: %s", path, error)
            return None
        with contextlib.suppress(OSError):  # some file systems have no such thing
            _sync_folder(self.path)
        return segment

    @property
    def file_bytes(self) -> int:
        """What all files take, bytes."""
        files: list[Stranger | Head] = [*self.strangers.values(), *(s.head for s in self.segments.values())]
        return sum(file.file_bytes for file in files)

    def free_bytes(self) -> int:
        """What the file system has left for whoever is no administrator."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def idlest(self, but: Callable[[Segment], bool]) -> Segment | Stranger | None:
        """The file whose pages were not used for longest, without those that ``but`` excepts."""
        files: list[Segment | Stranger] = [*self.strangers.values(), *(s for s in self.segments.values() if not but(s))]
        return min(files, key=last_used, default=None)

    def remove(self, file: Segment | Stranger) -> None:
        """Take a file away. A segment is still to be closed."""
        if isinstance(file, Segment):
            file.remove()
            self.segments.pop(file.path, None)
        else:
            file.path.unlink(missing_ok=True)
            self.strangers.pop(file.path, None)

    def close(self) -> None:
        """Let somebody else write. Segments are still to be closed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self, path: Path) -> None:
        try:
            segment = Segment.open(path, self._medium, self._writable)
        except FileNotFoundError:  # dropped between the listing and now
            return
        except (UnreadableSegment, OSError) as error:
            _log.warning("%s is not read: %s", path, error)
            stat = path.stat()
            self.strangers[path] = Stranger(path, stat.st_size, stat.st_mtime_ns, str(error))
            return
        if segment.head.identity == self.identity:
            self.segments[path] = segment
            return
        why = f"it is of the identity {segment.head.identity!r}"
        self.strangers[path] = Stranger(path, segment.head.file_bytes, segment.last_used(), why)
        segment.close()


def last_used(file: Segment | Stranger) -> int:
    """When any page of it was, ns since 1970."""
    return file.last_used() if isinstance(file, Segment) else file.used


def usual_file_bytes(room: int) -> int:
    """How large a file should be in a store of ``room`` bytes."""
    return min(max(room // _FEW, min(room // 8, _USUAL), _SMALLEST), _LARGEST)


def _require(path: Path, flags: int) -> None:
    try:
        os.close(os.open(path / "lock", os.O_RDONLY | flags))
    except OSError as error:
        raise ConfigError(f"direct=True is not possible in path={str(path)!r}: {error.strerror}") from None


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(path: Path) -> int:
    """Be the one who writes in a folder, which is made where there is none, until the file descriptor is closed.

    The lock ends with the process that holds it, however it ends. Raises ``ConfigError``: another has it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"the store's path={str(path)!r} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise ConfigError(
            f"process {holder} writes in the store's path={str(path)!r}, and only one may: stop it, give another "
            "path, or only read (read_only)"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
