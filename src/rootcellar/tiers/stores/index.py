"""The index of a file store, and its room: which page lies in which slot, and which has to go.

Nothing here is locked: the store that holds it does that.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from rootcellar.tiers.stores.file_settings import FileSettings
from rootcellar.tiers.stores.folder import Folder, Stranger, last_used, usual_file_bytes
from rootcellar.tiers.stores.segment import ENTRY, Segment
from rootcellar.tiers.stores.slotio import BLOCK, Medium, round_up

_STAMPS = 256
"""Uses of pages after which the times are written down: a killed process forgets as many."""
_log = logging.getLogger(__name__)


class Page(NamedTuple):
    """Where a page lies."""

    segment: Segment
    slot: int
    length: int
    """Bytes of its image."""
    checksum: int


Slot = tuple[Segment, int]


@dataclass(slots=True)
class SizeClass:
    """All pages whose slots have one size."""

    pages: dict[bytes, Page] = field(default_factory=dict)
    """In the order of their last use, the latest at the end."""
    free: list[Slot] = field(default_factory=list)
    """The next one to be taken at the end."""


class Index:
    """All pages of a folder that are of one identity."""

    def __init__(self, settings: FileSettings, medium: Medium, now: Callable[[], float]) -> None:
        """Open the folder. Raises ``ConfigError``: it cannot be used, or another process writes in it."""
        self.evicted = self.damaged = 0
        self._settings = settings
        self._now = now
        self._sizes: dict[int, SizeClass] = defaultdict(SizeClass)
        self._unstamped = 0
        self._folder = Folder(settings.path, settings.identity, medium, not settings.read_only)
        room = self._folder.free_bytes() - settings.min_free_space + self._folder.file_bytes
        self._room = max(room, 0) if settings.max_size is None else settings.max_size
        self._file_bytes = usual_file_bytes(self._room)
        self._learn(list(self._folder.segments.values()))
        while not settings.read_only and self._folder.file_bytes > self._room and self._drop_idlest():
            pass

    @property
    def pages(self) -> int:
        """How many can be found."""
        return sum(len(sized.pages) for sized in self._sizes.values())

    @property
    def file_bytes(self) -> int:
        """What all files take, those of other identities too."""
        return self._folder.file_bytes

    def close(self) -> None:
        """Forget all, and let another process write. Files that are in use are closed when they no longer are."""
        for segment in self._folder.segments.values():
            if not self._settings.read_only:
                segment.stamp()
            self._retire(segment)
        self._sizes.clear()
        self._folder.close()

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """Which of these can be found."""
        sizes = list(self._sizes.values())
        return [any(name in sized.pages for sized in sizes) for name in names]

    def look(self) -> None:
        """See what the process that writes has done."""
        if not self._settings.read_only:
            return
        known = set(self._folder.segments.values())
        for segment in self._folder.rescan():
            self._forget(segment)
            self._retire(segment)
        for segment in self._folder.segments.values():
            if segment not in known:
                self._learn([segment])
            elif segment.changed():
                self._forget(segment)
                segment.reload()
                self._learn([segment])

    def _learn(self, segments: Sequence[Segment]) -> None:
        """Know what lies in these files."""
        rows: list[tuple[int, bytes, Page]] = []
        for segment in segments:
            slots = segment.valid()
            free = np.ones(segment.head.slots, bool)
            free[slots] = False
            if not self._settings.read_only:
                free_slots = np.flatnonzero(free)[::-1].tolist()
                self._sizes[segment.head.slot_bytes].free += [(segment, slot) for slot in free_slots]
            fields = [segment.entries[name][slots].tolist() for name in ("used", "length", "checksum")]
            for name, slot, used, length, checksum in zip(segment.names(slots), slots.tolist(), *fields, strict=True):
                rows.append((used, name, Page(segment, slot, length, checksum)))
        rows.sort(key=lambda row: row[0])
        for _, name, page in rows:
            sized = self._sizes[page.segment.head.slot_bytes]
            older = sized.pages.pop(name, None)
            sized.pages[name] = page
            if older is not None and not self._settings.read_only:
                self._free(sized, older)

    def _forget(self, segment: Segment) -> None:
        """Know nothing of a file."""
        sized = self._sizes[segment.head.slot_bytes]
        for name in segment.names(segment.valid()):
            page = sized.pages.get(name)
            if page is not None and page.segment is segment:
                del sized.pages[name]

    def find(self, name: bytes, nbytes: int) -> Page | None:
        """The page of this name, if its image has so many bytes."""
        sized = self._sizes.get(round_up(nbytes))
        page = sized.pages.get(name) if sized is not None else None
        return page if page is not None and page.length == nbytes else None

    def used(self, reads: Sequence[tuple[bytes, Page, bool]]) -> None:
        """Note what was read (name, page, whether it was whole), unless it has gone from there."""
        touched: list[Page] = []
        for name, page, whole in reads:
            sized = self._sizes.get(page.segment.head.slot_bytes)
            if sized is None or sized.pages.get(name) != page:
                continue
            del sized.pages[name]
            if whole:
                sized.pages[name] = page
                touched.append(page)
            elif not self._settings.read_only:
                self._damage(page)
                self._free(sized, page)
            elif not page.segment.changed():  # else it was written over meanwhile
                self._damage(page)
        self._touch(touched)

    def _damage(self, page: Page) -> None:
        self.damaged += 1
        _log.warning("%s: the page in slot %d is damaged and forgotten", page.segment.path, page.slot)

    def _touch(self, pages: Sequence[Page]) -> None:
        """These are used now."""
        if self._settings.read_only:
            return
        by_file: dict[Segment, list[int]] = defaultdict(list)
        for page in pages:
            by_file[page.segment].append(page.slot)
        for segment, slots in by_file.items():
            segment.touch(slots, self._stamp())
        self._unstamped += len(pages)
        if self._unstamped >= _STAMPS:
            self._unstamped = 0
            for segment in self._folder.segments.values():
                segment.stamp()

    def _stamp(self) -> int:
        return max(int(self._now() * 1e9), 0)

    def publish(
        self,
        names: Sequence[bytes],
        views: Sequence[memoryview],
        places: Mapping[int, Slot],
        written: Mapping[int, int],
    ) -> None:
        """Make what was written findable, and the other places free again."""
        by_file: dict[Segment, list[tuple[int, int]]] = defaultdict(list)
        for i, (segment, slot) in places.items():
            if i in written:
                by_file[segment].append((slot, i))
            else:
                self._sizes[segment.head.slot_bytes].free.append((segment, slot))
        stamp = self._stamp()
        for segment, pairs in by_file.items():
            entries = np.zeros(len(pairs), ENTRY)
            entries["name"] = np.frombuffer(b"".join(names[i] for _, i in pairs), ENTRY["name"])
            entries["checksum"] = [written[i] for _, i in pairs]
            entries["made"] = entries["used"] = stamp
            entries["length"] = [len(views[i]) for _, i in pairs]
            segment.write([slot for slot, _ in pairs], entries)
            pages = self._sizes[segment.head.slot_bytes].pages
            for slot, i in pairs:
                pages[names[i]] = Page(segment, slot, len(views[i]), written[i])

    @staticmethod
    def enter(segments: Iterable[Segment]) -> None:
        """A call begins that reads or writes images there: these files stay."""
        for segment in segments:
            segment.users += 1

    @staticmethod
    def leave(segments: Iterable[Segment]) -> None:
        """It ends."""
        for segment in segments:
            segment.users -= 1
            if segment.retired and not segment.users:
                segment.close()

    @staticmethod
    def _retire(segment: Segment) -> None:
        """Close a file as soon as nobody uses it."""
        segment.retired = True
        if not segment.users:
            segment.close()

    # --- room ---------------------------------------------------------------------------------------------------------

    def keep_free(self) -> None:
        """Give a file back where others need the room; one at a call, so that a short want does not cost everything."""
        if self._folder.free_bytes() < self._settings.min_free_space:
            self._drop_idlest()

    def _drop_idlest(self) -> bool:
        victim = self._folder.idlest(lambda segment: segment.users > 0)
        if victim is not None:
            self._drop(victim)
        return victim is not None

    def clear(self) -> int:
        """Forget every page, and take away the files that nobody uses; how many pages there were."""
        pages = self.pages
        while self._drop_idlest():
            pass
        for sized in self._sizes.values():
            for page in list(sized.pages.values()):
                self._free(sized, page)
            sized.pages.clear()
        return pages

    def _drop(self, victim: Segment | Stranger) -> None:
        """Take a file away."""
        if isinstance(victim, Segment):
            self.evicted += len(victim.valid())
            self._forget(victim)
            sized = self._sizes[victim.head.slot_bytes]
            sized.free = [slot for slot in sized.free if slot[0] is not victim]
        self._folder.remove(victim)
        if isinstance(victim, Segment):
            self._retire(victim)

    def absent(self, names: Sequence[bytes], views: Sequence[memoryview]) -> dict[int, list[int]]:
        """Which are not there, once each, by the size of their slots; the others count as used now."""
        new: dict[int, list[int]] = defaultdict(list)
        touched: list[Page] = []
        for name, i in {name: i for i, name in reversed(list(enumerate(names)))}.items():
            for sized in self._sizes.values():
                page = sized.pages.pop(name, None)
                if page is not None and page.length == len(views[i]):
                    sized.pages[name] = page
                    touched.append(page)
                    break
                if page is not None:  # a name that was given to two lengths has the latest
                    self._free(sized, page)
            else:
                new[round_up(len(views[i]))].append(i)
        self._touch(touched)
        return {size: sorted(group) for size, group in new.items()}

    def take(self, size: int, group: Sequence[int]) -> dict[int, Slot]:
        """Slots for these, as many as there is room for; nothing of what was in them is findable."""
        sized = self._sizes[size]
        grows = True
        slots: list[Slot] = []
        emptied: dict[Segment, list[int]] = defaultdict(list)
        while len(slots) < len(group):
            if sized.free:
                slots.append(sized.free.pop())
            elif grows:
                grows = self._grow(size, sized)
            else:  # all at once: to find the first of a dict takes longer the more were taken from it before
                for name in list(islice(sized.pages, len(group) - len(slots))):
                    page = sized.pages.pop(name)
                    emptied[page.segment].append(page.slot)
                    slots.append((page.segment, page.slot))
                break
        for segment, gone in emptied.items():
            self.evicted += len(gone)
            segment.clear(sorted(gone))
        slots.sort(key=lambda slot: (slot[0].path.name, slot[1]))
        return dict(zip(group, slots, strict=False))

    def _free(self, sized: SizeClass, page: Page) -> None:
        page.segment.clear([page.slot])
        sized.free.append((page.segment, page.slot))

    def _grow(self, size: int, sized: SizeClass) -> bool:
        """One more file of slots of this size, in the place of others that were used before all pages of this size."""
        usual = max(self._file_bytes, 4 * size)
        least = usual // 4 if sized.pages else size + 3 * BLOCK
        while True:
            left = self._room - self._folder.file_bytes
            if left >= least:  # else there is no need to ask the file system, which takes its time
                left = min(left, self._folder.free_bytes() - self._settings.min_free_space)
            if left >= least:
                segment = self._folder.create(size, min(usual, left))
                if segment is not None:
                    sized.free += [(segment, slot) for slot in reversed(range(segment.head.slots))]
                return segment is not None
            victim = self._folder.idlest(lambda other: other.head.slot_bytes == size or other.users > 0)
            if victim is None or (sized.pages and last_used(victim) >= self._oldest(sized)):
                return False
            self._drop(victim)

    @staticmethod
    def _oldest(sized: SizeClass) -> int:
        page = next(iter(sized.pages.values()))
        return int(page.segment.entries["used"][page.slot])
