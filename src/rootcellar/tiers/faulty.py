"""A place that breaks, for tests: copies that are late, fail, end early or give other bytes, by a seed.

What is other bytes is noticed by a checksum of each image, which is taken when it is written down and
compared when it is fetched.
"""

from __future__ import annotations

import threading
import time
import zlib
from dataclasses import asdict, dataclass

import numpy as np

from rootcellar.pools.copying import Copier, Fetched, PageNumbers, Wait
from rootcellar.pools.images import Image, Images, Rows


@dataclass(frozen=True)
class Faults:
    """How often each happens, 0 to 1; ``late``: most seconds by which what is late is late."""

    delay: float = 0.0
    fail: float = 0.0
    short: float = 0.0
    flip: float = 0.0
    late: float = 0.002


class Faulty:
    """Copies as ``copier`` does, but for its faults."""

    in_place = False

    def __init__(self, copier: Copier, faults: Faults, seed: int) -> None:
        self._copier = copier
        self._rates = asdict(faults)
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._sums: dict[int, int] = {}
        self.seen = dict.fromkeys(("delay", "fail", "short", "flip", "caught"), 0)
        """How often each fault happened, and how often other bytes were noticed."""

    @property
    def image(self) -> Image:
        """See ``Copier``."""
        return self._copier.image

    def read(self, pages: PageNumbers, images: Images, rows: Rows) -> Wait:
        """See ``Copier``."""
        short = self._happens("short")
        count = len(pages) // 2 if short else len(pages)
        inner = self._copier.read(pages[:count], images, rows[:count])

        def wait() -> None:
            inner()
            self._break("reading the device")
            if short:
                raise OSError(f"{count} of {len(pages)} pages were written down")
            for row in rows.tolist():
                self._sums[row] = zlib.crc32(images[row])
            if self._happens("flip"):
                images[rows[0], images.shape[1] // 2] ^= 0x40

        return wait

    def fetch(self, images: Images, rows: Rows) -> Fetched:
        """See ``Copier``."""
        self._break("reading the host")
        if self._happens("short"):
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

    def _break(self, what: str) -> None:
        if self._happens("delay"):
            with self._lock:
                late = self._random.random() * self._rates["late"]
            time.sleep(late)
        if self._happens("fail"):
            raise OSError(f"{what} failed")

    def _happens(self, fault: str) -> bool:
        with self._lock:
            happens = bool(self._random.random() < self._rates[fault])
            self.seen[fault] += happens
        return happens
