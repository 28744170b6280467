"""A shared file system such as 3FS: pages in slots of a large file on its mount, found by an index that all share.

The shape is that of SGLang's store for 3FS: a slot is reserved in the index, written, and confirmed there, so nobody
reads what is not whole; a reservation whose writer died is taken back. Bytes go through the mount. 3FS's own client
(``usrbio``), which goes past the kernel, is not used.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import nothing_else, take_optional, take_size, take_text
from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.passage import Passage

_BLOCK = 4096
_ABANDONED = 60.0
"""Seconds after which a reservation that nobody confirmed is taken back."""
_PATIENCE = 5.0
"""Seconds that an index which others hold is waited for."""
_UNDER_WAY = 1.0
"""Seconds that a page which somebody else writes is waited for."""
_TABLE = """
CREATE TABLE IF NOT EXISTS pages (
    name BLOB PRIMARY KEY, slot_bytes INTEGER, slot INTEGER, length INTEGER, confirmed INTEGER, used REAL,
    UNIQUE (slot_bytes, slot)
) WITHOUT ROWID"""
_SHARED = "CREATE TABLE IF NOT EXISTS shared (setting TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID"
"""What all who use an index must agree on, since it says where a slot lies: whoever comes first says it."""


@dataclass(frozen=True, slots=True)
class Hf3fsSettings:
    """Of a store on a shared file system. The first names are SGLang's."""

    file_path_prefix: Path
    """Of the files on the mount: the shard, the size of a slot, and ``.bin`` follow."""
    file_size: int = 1 << 30
    """Bytes of each; one for each size of image. The same for all who share an index."""
    numjobs: int = 4
    """Reads or writes at once."""
    shard: int = 0
    """A file for each engine of several that share an index keeps their writes apart; all read all."""
    index_path: Path | None = None
    """Of the index; None: beside the files. Elsewhere it must be seen by all who share the files."""


def read_settings(extra: Mapping[str, object]) -> Hf3fsSettings:
    """What ``--hicache-storage-backend-extra-config`` says of it. Raises ``ConfigError``."""
    own = dict(extra)
    index = take_optional(own, "index_path")
    settings = Hf3fsSettings(
        Path(take_text(own, "file_path_prefix")).expanduser(),
        file_size=take_size(own, "file_size", 1 << 30) or 0,
        numjobs=int(positive(own, "numjobs", 4, whole=True)),
        shard=int(positive(own, "shard", 0, whole=True, zero=True)),
        index_path=None if index is None else Path(index).expanduser(),
    )
    nothing_else(own, "hf3fs", "file_path_prefix, file_size, numjobs, shard, index_path")
    return settings


class Hf3fsStore:
    """A :class:`~rootcellar.tiers.store.Store` on a mount."""

    verifies = False

    def __init__(self, settings: Hf3fsSettings, now: Callable[[], float] = time.time) -> None:
        """Raises ``ConfigError``: the mount or the index cannot be used."""
        self.settings = settings
        prefix = settings.file_path_prefix
        index = settings.index_path or prefix.with_name(f"{prefix.name}.index")
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._index = sqlite3.connect(index, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(prefix, error) from None
        try:
            # A killed process is rolled back by the next; a machine that stops may cost the index, not the truth.
            self._index.execute("PRAGMA journal_mode=TRUNCATE")
            self._index.execute("PRAGMA synchronous=OFF")
            self._index.execute(_TABLE)
            self._index.execute(_SHARED)
            self._index.execute("INSERT OR IGNORE INTO shared VALUES ('file_size', ?)", (settings.file_size,))
            (file_size,) = self._index.execute("SELECT value FROM shared WHERE setting = 'file_size'").fetchone()
        except sqlite3.Error as error:
            self._index.close()
            raise _unusable(prefix, error) from None
        if file_size != settings.file_size:
            self._index.close()
            raise ConfigError(
                f"file_size={settings.file_size} is not allowed: those who share the index {index} have {file_size}; "
                "give the same, or another file_path_prefix"
            )
        self._now = now
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        self._used: set[bytes] = set()
        self._pool = ThreadPoolExecutor(settings.numjobs, thread_name_prefix="rootcellar-hf3fs")
        self._passage = Passage()

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)
        with self._passage, self._asking():
            return [self._find(name) is not None for name in names]

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)
        views = [view.cast("B") for view in into]
        with self._passage:
            with self._asking():
                found = [self._find(name) for name in names]
                self._used.update(name for name, place in zip(names, found, strict=True) if place is not None)
            places = [
                place[:2] if place is not None and place[2] == len(view) else None
                for place, view in zip(found, views, strict=True)
            ]
            return self._each(self._read, places, views)

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``; False where the file has no slot that could be taken. Raises ``OSError``."""
        check_names(names, blocks)
        views = [block.cast("B") for block in blocks]
        with self._passage:
            with self._asking(), self._changing():
                self._note_uses()
                places = [self._reserve(name, len(view)) for name, view in zip(names, views, strict=True)]
            self._each(self._write, places, views)
            with self._asking(), self._changing():
                done = [(name, *place) for name, place in zip(names, places, strict=True) if place is not None]
                which = "name = ? AND slot_bytes = ? AND slot = ?"  # it may have been taken back meanwhile
                self._index.executemany(f"UPDATE pages SET confirmed = 1 WHERE {which}", done)
            return self._kept(names)

    def clear(self) -> int:
        """See ``Store``: all pages of all shards. Raises ``OSError``."""
        with self._passage, self._asking(), self._changing():
            (count,) = self._index.execute("SELECT count(*) FROM pages WHERE confirmed").fetchone()
            self._index.execute("DELETE FROM pages")
            return int(count)

    def register(self, _buffer: memoryview) -> None:
        """Nothing comes of it."""

    def close(self) -> None:
        """See ``Store``; calls that are under way end first."""
        if self._passage.shut():
            self._pool.shutdown()
            self._index.close()
            for fd in self._files.values():
                os.close(fd)

    # --- the index, under the lock ------------------------------------------------------------------------------------

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise OSError(f"the index of the hf3fs store failed: {error}") from error

    @contextmanager
    def _changing(self) -> Iterator[None]:
        self._index.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._index.execute("COMMIT")
        except BaseException:
            if self._index.in_transaction:  # else SQLite has ended it itself
                self._index.execute("ROLLBACK")
            raise

    def _find(self, name: bytes) -> tuple[int, int, int] | None:
        """The size of slots, the slot, and the length of a page that is whole."""
        row = self._index.execute("SELECT slot_bytes, slot, length FROM pages WHERE name = ? AND confirmed", (name,))
        found: tuple[int, int, int] | None = row.fetchone()
        return found

    def _kept(self, names: Sequence[bytes]) -> list[bool]:
        """Which of these are there, once those that somebody else is writing are, or that took too long."""
        until = time.monotonic() + _UNDER_WAY
        while True:
            with self._asking():
                asked = "SELECT confirmed FROM pages WHERE name = ?"
                rows = [self._index.execute(asked, (name,)).fetchone() for name in names]
            if (0,) not in rows or time.monotonic() > until:
                return [row == (1,) for row in rows]
            time.sleep(0.001)

    def _note_uses(self) -> None:
        now = self._now()
        self._index.executemany("UPDATE pages SET used = ? WHERE name = ?", [(now, name) for name in self._used])
        self._used.clear()

    def _reserve(self, name: bytes, length: int) -> tuple[int, int] | None:
        """The size of slots and a slot for a page that is not there; None: it is, or is being written, or no room."""
        slot_bytes, now = -(-length // _BLOCK) * _BLOCK, self._now()
        self._index.execute("DELETE FROM pages WHERE name = ? AND NOT confirmed AND used < ?", (name, now - _ABANDONED))
        if self._index.execute("SELECT 1 FROM pages WHERE name = ?", (name,)).fetchone():
            return None
        slots = self.settings.file_size // slot_bytes
        first = self.settings.shard * slots
        mine = (slot_bytes, first, first + slots)
        between = "slot_bytes = ? AND slot >= ? AND slot < ?"
        (last,) = self._index.execute(f"SELECT max(slot) FROM pages WHERE {between}", mine).fetchone()
        slot = first if last is None else last + 1
        if slot >= first + slots:
            oldest = self._index.execute(
                f"SELECT slot FROM pages WHERE {between} AND (confirmed OR used < ?) ORDER BY used LIMIT 1",
                (*mine, now - _ABANDONED),
            ).fetchone()
            if oldest is None:
                return None
            (slot,) = oldest
            self._index.execute("DELETE FROM pages WHERE slot_bytes = ? AND slot = ?", (slot_bytes, slot))
        self._index.execute("INSERT INTO pages VALUES (?, ?, ?, ?, 0, ?)", (name, slot_bytes, slot, length, now))
        return slot_bytes, slot

    # --- bytes, without it --------------------------------------------------------------------------------------------

    def _each(
        self,
        move: Callable[[tuple[int, int], memoryview], bool],
        places: Sequence[tuple[int, int] | None],
        views: Sequence[memoryview],
    ) -> list[bool]:
        calls = [
            None if place is None else self._pool.submit(move, place, view)
            for place, view in zip(places, views, strict=True)
        ]
        wait([call for call in calls if call is not None])
        return [call is not None and call.result() for call in calls]

    def _read(self, place: tuple[int, int], view: memoryview) -> bool:
        fd, offset, done = *self._at(*place), 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                return False
            done += count
        return True

    def _write(self, place: tuple[int, int], view: memoryview) -> bool:
        fd, offset, done = *self._at(*place), 0
        while done < len(view):
            done += os.pwritev(fd, [view[done:]], offset + done)
        return True

    def _at(self, slot_bytes: int, slot: int) -> tuple[int, int]:
        """The file of a slot, and where in it that is."""
        slots = self.settings.file_size // slot_bytes
        shard, within = divmod(slot, slots)
        with self._lock:
            fd = self._files.get(slot_bytes << 16 | shard)
            if fd is None:
                prefix = self.settings.file_path_prefix
                path = prefix.with_name(f"{prefix.name}.{shard}.{slot_bytes}.bin")
                fd = self._files[slot_bytes << 16 | shard] = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                if os.fstat(fd).st_size < slots * slot_bytes:
                    os.truncate(fd, slots * slot_bytes)
        return fd, within * slot_bytes


def _unusable(prefix: Path, error: Exception) -> ConfigError:
    return ConfigError(f"the hf3fs store at {str(prefix)!r} cannot be used: {error}")


def open_store(extra: Mapping[str, object], _identity: str) -> Hf3fsStore:
    """See ``registry``."""
    return Hf3fsStore(read_settings(extra))
