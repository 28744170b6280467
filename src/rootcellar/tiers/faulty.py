"""Places that break, for tests: what is late, fails, ends early or gives other bytes, by a seed.

That a copy gives other bytes is noticed by a checksum of each image, which is taken when it is written down and
compared when it is fetched; a store that keeps no checksums has a guard for that.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from rootcellar.pools.copying import Copier, Fetched, PageNumbers, Wait
from rootcellar.pools.images import Image, Images, Rows
from rootcellar.tiers.store import Store


@dataclass(frozen=True)
class Faults:
    """How often each happens, 0 to 1; ``late``: most seconds by which what is late is late."""

    delay: float = 0.0
    fail: float = 0.0
    short: float = 0.0
    flip: float = 0.0
    lie: float = 0.0
    """A store says that it has a page, or that it keeps it, and does not."""
    late: float = 0.002


class _Dice:
    """Whether a fault happens now, by a seed; from any thread."""

    def __init__(self, faults: Faults, seed: int, seen: dict[str, int]) -> None:
        """``seen`` counts what happened."""
        self._rates = asdict(faults)
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._seen = seen

    def happens(self, fault: str) -> bool:
        """Whether this one does."""
        with self._lock:
            happens = bool(self._random.random() < self._rates[fault])
            self._seen[fault] += happens
        return happens

    def below(self, most: int) -> int:
        """A number from 0 on, less than ``most``."""
        with self._lock:
            return int(self._random.integers(most))

    def strain(self, what: str) -> None:
        """Be late, or raise ``OSError``, where that happens."""
        if self.happens("delay"):
            with self._lock:
                late = self._random.random() * self._rates["late"]
            time.sleep(late)
        if self.happens("fail"):
            raise OSError(f"{what} failed")


class Faulty:
    """Copies as ``copier`` does, but for its faults."""

    in_place = False

    def __init__(self, copier: Copier, faults: Faults, seed: int) -> None:
        self._copier = copier
        self._sums: dict[int, int] = {}
        self.seen = dict.fromkeys(("delay", "fail", "short", "flip", "caught"), 0)
        """How often each fault happened, and how often other bytes were noticed."""
        self._dice = _Dice(faults, seed, self.seen)

    @property
    def image(self) -> Image:
        """See ``Copier``."""
        return self._copier.image

    def read(self, pages: PageNumbers, images: Images, rows: Rows) -> Wait:
        """See ``Copier``."""
        short = self._dice.happens("short")
        count = len(pages) // 2 if short else len(pages)
        inner = self._copier.read(pages[:count], images, rows[:count])

        def wait() -> None:
            inner()
            self._dice.strain("reading the device")
            if short:
                raise OSError(f"{count} of {len(pages)} pages were written down")
            for row in rows.tolist():
                self._sums[row] = zlib.crc32(images[row])
            if self._dice.happens("flip"):
                images[rows[0], images.shape[1] // 2] ^= 0x40

        return wait

    def fetch(self, images: Images, rows: Rows) -> Fetched:
        """See ``Copier``."""
        self._dice.strain("reading the host")
        if self._dice.happens("short"):
            raise OSError(f"{len(rows) // 2} of {len(rows)} pages were read")
        for row in rows.tolist():
            if zlib.crc32(images[row]) != self._sums[row]:
                self.seen["caught"] += 1
                raise OSError(f"row {row} has other bytes than were written down")
        return self._copier.fetch(images, rows)

    def write(self, pages: PageNumbers, fetched: Fetched) -> Wait:
        """See ``Copier``."""
        return self._copier.write(pages, fetched)

    def compile(self) -> None:
        """See ``Copier``."""
        self._copier.compile()


class FaultyStore:
    """A :class:`~rootcellar.tiers.store.Store` like ``store``, but for its faults. It does not check what it gives."""

    verifies = False

    def __init__(self, store: Store, faults: Faults, seed: int) -> None:
        self._store = store
        self.seen = dict.fromkeys(("delay", "fail", "short", "flip", "lie"), 0)
        """How often each fault happened."""
        self._dice = _Dice(faults, seed, self.seen)

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``; pages that are not there may be there for once."""
        self._dice.strain("asking")
        return [there or self._dice.happens("lie") for there in self._store.has(names)]

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``; some of the pages, others' bytes, or a bit of them otherwise."""
        self._dice.strain("reading")
        found = self._store.get(names, into)
        if names and self._dice.happens("short"):
            found = found[: len(found) // 2] + [False] * (len(found) - len(found) // 2)
        for view in into:
            if self._dice.happens("flip"):
                view[self._dice.below(len(view))] ^= 1 << self._dice.below(8)
        if len(names) > 1 and self._dice.happens("flip"):
            self._store.get([names[0]], [into[1]])
        return found

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``; some of the pages are kept, or fewer than it says, or with a bit of them otherwise."""
        self._dice.strain("writing")
        count = len(names) // 2 if self._dice.happens("short") else len(names)
        kept = [bytearray(block) for block in blocks[:count]]
        for block in kept:
            if self._dice.happens("flip"):
                block[self._dice.below(len(block))] ^= 1 << self._dice.below(8)
        held = self._store.put(names[:count], [memoryview(block) for block in kept])
        return held + [self._dice.happens("lie") for _ in names[count:]]

    def clear(self) -> int:
        """See ``Store``."""
        self._dice.strain("clearing")
        return self._store.clear()

    def register(self, buffer: memoryview) -> None:
        """See ``Store``."""
        self._dice.strain("registering")
        self._store.register(buffer)

    def close(self) -> None:
        """See ``Store``."""
        self._store.close()
