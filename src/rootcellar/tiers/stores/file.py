"""The file store: pages in slots of a few large files, found by an index that a killed process cannot spoil.

What it promises, and what not:

- A page that ``put`` confirmed is there when the process is killed at any instant, and until ``max_size`` or
  ``min_free_space`` ask for its room. After a power cut it is there if ``fsync`` is set, and else if the system had
  written it by then.
- ``get`` never returns what is not whole and the name's own: format, name, length and bytes are in one checksum.
- One process writes in a folder, any number read. A reader sees what is put while it runs, and is no use of a page.
- The least recently used page of its size goes first; a whole file of pages of another size, or of another identity,
  where all of them were used before it.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.file_settings import FileSettings, read_settings
from rootcellar.tiers.stores.index import Index, Page, Slot
from rootcellar.tiers.stores.segment import Segment, seed_of
from rootcellar.tiers.stores.slotio import Crew, Run, medium, runs


@dataclass(frozen=True, slots=True)
class Usage:
    """What a file store holds and has done since it was opened."""

    pages: int
    file_bytes: int
    evicted: int
    """Pages that made room."""
    damaged: int
    """Pages that were found not to be whole, and are forgotten."""


def open_store(extra: Mapping[str, object], identity: str) -> FileStore:
    """See ``registry``."""
    return FileStore(read_settings(extra, identity))


class FileStore:
    """A :class:`~rootcellar.tiers.store.Store` in a folder."""

    verifies = True

    def __init__(self, settings: FileSettings, now: Callable[[], float] = time.time) -> None:
        """Open the folder; ``now``: seconds since 1970. Raises ``ConfigError``: it cannot be used, or is written in."""
        self.settings = settings
        self._medium = medium(settings.direct)
        self._index = Index(settings, self._medium, now)
        self._crew = Crew(self._medium.in_flight - 1, "rootcellar-file-store")
        self._lock = threading.Lock()
        """Of the index; images are read and written without it."""
        self._putting = threading.Lock()
        """Puts are one after the other; gets go on meanwhile."""
        self._closed = False

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``ValueError`` when it is closed."""
        check_names(names)
        with self._lock:
            self._look()
            return self._index.has(names)

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError`` when nothing could be read, ``ValueError`` when it is closed."""
        check_names(names, into)
        views = [view.cast("B") for view in into]
        wanted: dict[Segment, list[tuple[int, int, Page]]] = defaultdict(list)
        with self._lock:
            self._look()
            for i, name in enumerate(names):
                page = self._index.find(name, len(views[i]))
                if page is not None:
                    wanted[page.segment].append((page.slot, i, page))
            self._index.enter(wanted)
        sums: dict[int, int | None] = {}
        errors: list[OSError] = []
        whole: dict[int, bool] = {}
        try:
            self._read(wanted, names, views, sums, errors)
            whole = {i: sums[i] == page.checksum for rows in wanted.values() for _, i, page in rows if i in sums}
        finally:
            with self._lock:
                self._index.leave(wanted)
                self._index.used(
                    [(names[i], page, whole[i]) for rows in wanted.values() for _, i, page in rows if i in whole]
                )
        if errors and not any(whole.values()):
            raise errors[0]
        return [whole.get(i, False) for i in range(len(names))]

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError`` when the medium fails, ``ValueError`` when it is closed."""
        check_names(names, blocks)
        views = [block.cast("B") for block in blocks]
        if self.settings.read_only:
            return [False] * len(names)
        with self._putting:
            with self._lock:
                self._look()
                self._index.keep_free()
                places: dict[int, Slot] = {}
                for size, group in self._index.absent(names, views).items():
                    taken = self._index.take(size, group)
                    self._index.enter(_segments_of(taken))
                    places |= taken
            written: dict[int, int] = {}
            try:
                self._write(places, names, views, written)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            finally:
                with self._lock:
                    try:
                        self._index.publish(names, views, places, written)
                    finally:
                        self._index.leave(_segments_of(places))
            self._sync(places)
            with self._lock:
                return [self._index.find(name, len(view)) is not None for name, view in zip(names, views, strict=True)]

    def clear(self) -> int:
        """See ``Store``. Files of other identities go as well. Raises ``ValueError`` when it is closed."""
        with self._putting, self._lock:
            self._look()
            return 0 if self.settings.read_only else self._index.clear()

    def register(self, _buffer: memoryview) -> None:
        """Nothing comes of it."""

    def close(self) -> None:
        """See ``Store``. A ``put`` that is under way ends first."""
        with self._putting, self._lock:
            if self._closed:
                return
            self._closed = True
            self._index.close()
            self._crew.close()

    def usage(self) -> Usage:
        """What it holds and has done."""
        with self._lock:
            index = self._index
            return Usage(index.pages, index.file_bytes, index.evicted, index.damaged)

    def _look(self) -> None:
        if self._closed:
            raise ValueError("the file store is closed")
        self._index.look()

    # --- bytes, without the lock --------------------------------------------------------------------------------------

    def _read(
        self,
        wanted: Mapping[Segment, list[tuple[int, int, Page]]],
        names: Sequence[bytes],
        views: Sequence[memoryview],
        sums: dict[int, int | None],
        errors: list[OSError],
    ) -> None:
        """Fill the views from what is ``wanted``: slot, index, page. ``sums`` gets the checksums; where a read failed,
        None, and ``errors`` its error.
        """

        def read(job: tuple[Segment, Run]) -> None:
            segment, run = job
            try:
                found = self._medium.read(segment.images, segment.offset(run.slot), segment.head.slot_bytes, run)
            except OSError as error:
                errors.append(error)
                found = [None] * len(run.rows)
            sums.update(zip(run.rows, found, strict=True))

        slots = {segment: sorted((slot, i) for slot, i, _ in rows) for segment, rows in wanted.items()}
        self._crew.each(read, _jobs(slots, names, views, self._medium.run))

    def _write(
        self, places: Mapping[int, Slot], names: Sequence[bytes], views: Sequence[memoryview], written: dict[int, int]
    ) -> None:
        """Write images to their places, ascending within a file; ``written`` gets the checksums of those that were.

        Raises ``OSError``: some could not be.
        """
        errors: list[OSError] = []

        def write(job: tuple[Segment, Run]) -> None:
            segment, run = job
            try:
                if not errors:
                    sums = self._medium.write(segment.images, segment.offset(run.slot), segment.head.slot_bytes, run)
                    written.update(zip(run.rows, sums, strict=True))
            except OSError as error:
                errors.append(error)

        slots: dict[Segment, list[tuple[int, int]]] = defaultdict(list)
        for i, (segment, slot) in places.items():
            slots[segment].append((slot, i))
        self._crew.each(write, _jobs(slots, names, views, self._medium.run))
        if errors:
            raise errors[0]

    def _sync(self, places: Mapping[int, Slot]) -> None:
        """Wait for images and entries at once: an entry whose image a power cut lost has another checksum."""
        if self.settings.fsync:
            for segment in _segments_of(places):
                segment.sync()


def _jobs(
    slots: Mapping[Segment, Sequence[tuple[int, int]]], names: Sequence[bytes], views: Sequence[memoryview], piece: int
) -> list[tuple[Segment, Run]]:
    """Transfers: of each file slots, ascending, with indices into ``names`` and ``views``."""
    jobs: list[tuple[Segment, Run]] = []
    for segment, pairs in slots.items():
        rows = [i for _, i in pairs]
        seeds = [seed_of(names[i], len(views[i])) for i in rows]
        some = runs([slot for slot, _ in pairs], [views[i] for i in rows], seeds, rows, segment.head.slot_bytes, piece)
        jobs += [(segment, run) for run in some]
    return jobs


def _segments_of(places: Mapping[int, Slot]) -> set[Segment]:
    return {segment for segment, _ in places.values()}
