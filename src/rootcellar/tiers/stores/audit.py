"""What lies in the folder of a file store, whoever put it: looked at, verified, and taken away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rootcellar.errors import ConfigError
from rootcellar.tiers.stores.folder import lock
from rootcellar.tiers.stores.segment import SUFFIX, Segment, UnreadableSegment, seed_of
from rootcellar.tiers.stores.slotio import Run, medium


@dataclass(frozen=True, slots=True)
class Holding:
    """A file. Times are seconds since 1970, None where it has no page."""

    path: Path
    identity: str
    slot_bytes: int
    slots: int
    pages: int
    page_bytes: int
    """Of the images; ``file_bytes`` is what the file takes."""
    file_bytes: int
    oldest: float | None
    """When the first of its pages was put."""
    last_used: float | None
    unreadable: str = ""
    """Why it is not a file of this format; all else but its size is then unknown."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A page that can be found and is not whole, or a file that cannot be read (``slot`` is None)."""

    path: Path
    slot: int | None
    name: str
    """Hexadecimal."""
    why: str


def holdings(folder: Path) -> list[Holding]:
    """Every file of a store. Raises ``ConfigError``: there is no such folder."""
    return [_holding(path) for path in _files(folder)]


def damages(folder: Path, mend: bool = False) -> Iterator[Damage | int]:
    """Read every page that can be found: each that is not whole, and after each file how many were read.

    With ``mend`` those are made free, and files that cannot be read are taken away; nobody else may write meanwhile.
    """
    with _writing(folder) if mend else _reading(folder):
        for path in _files(folder):
            try:
                segment = Segment.open(path, medium(direct=False), writable=mend)
            except FileNotFoundError:
                continue
            except (OSError, UnreadableSegment) as error:
                yield Damage(path, None, "", str(error))
                if mend:
                    path.unlink(missing_ok=True)
                continue
            try:
                yield from _damages(segment, mend)
            finally:
                segment.close()


def prune(folder: Path, max_size: int | None, older_than: float | None) -> tuple[int, int]:
    """Take away pages that were last used before ``older_than`` (seconds since 1970), files without pages, and then
    whole files, least recently used first, until all take at most ``max_size`` bytes.

    Returns how many pages and bytes of files went. Raises ``ConfigError``: somebody writes in the folder.
    """
    pages = nbytes = 0
    with _writing(folder):
        rest: list[tuple[int, Path, int, int]] = []
        for path in _files(folder):
            try:
                segment = Segment.open(path, medium(direct=False), writable=True)
            except (OSError, UnreadableSegment):
                rest.append((path.stat().st_mtime_ns, path, path.stat().st_size, 0))
                continue
            slots = segment.valid()
            old = slots[segment.entries["used"][slots] < max(0, int((older_than or 0) * 1e9))]
            segment.clear(old.tolist())
            pages += len(old)
            kept = len(slots) - len(old)
            if kept:
                rest.append((segment.last_used(), path, segment.head.file_bytes, kept))
            else:
                segment.remove()
                nbytes += segment.head.file_bytes
            segment.close()
        total = sum(size for _, _, size, _ in rest)
        for _, path, size, kept in sorted(rest):
            if max_size is None or total <= max_size:
                break
            path.unlink()
            total, nbytes, pages = total - size, nbytes + size, pages + kept
    return pages, nbytes


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder")
    return sorted(folder.glob("*" + SUFFIX))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    _files(folder)  # a store is not made by looking for it
    held = lock(folder)
    try:
        yield
    finally:
        os.close(held)


@contextmanager
def _reading(_folder: Path) -> Iterator[None]:
    yield


def _holding(path: Path) -> Holding:
    size = path.stat().st_size
    try:
        segment = Segment.open(path, medium(direct=False), writable=False)
    except (OSError, UnreadableSegment) as error:
        return Holding(path, "", 0, 0, 0, 0, size, None, None, str(error))
    head, slots = segment.head, segment.valid()
    rows = segment.entries[slots]
    segment.close()
    return Holding(
        path,
        head.identity,
        head.slot_bytes,
        head.slots,
        len(slots),
        int(rows["length"].sum()),
        size,
        int(rows["made"].min()) / 1e9 if len(slots) else None,
        int(rows["used"].max()) / 1e9 if len(slots) else None,
    )


def _damages(segment: Segment, mend: bool) -> Iterator[Damage | int]:
    slots = segment.valid()
    buffer = memoryview(bytearray(segment.head.slot_bytes))
    seen = 0
    for slot, name in zip(slots.tolist(), segment.names(slots), strict=True):
        why = _wrong(segment, slot, name, buffer)
        if why and segment.changed():  # by whoever writes in it: it may be another page by now
            segment.reload()
            now_there = segment.names(np.array([slot]))[0] == name and segment.entries["length"][slot]
            why = _wrong(segment, slot, name, buffer) if now_there else ""
        seen += 1
        if why:
            yield Damage(segment.path, slot, name.hex(), why)
            if mend:
                segment.clear([slot])
    yield seen


def _wrong(segment: Segment, slot: int, name: bytes, buffer: memoryview) -> str:
    length, checksum = int(segment.entries["length"][slot]), int(segment.entries["checksum"][slot])
    run = Run(slot, [buffer[:length]], [seed_of(name, length)], [slot])
    try:
        (found,) = segment.medium.read(segment.images, segment.offset(slot), segment.head.slot_bytes, run)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if found is None:
        return "the file ends before it does"
    return "" if found == checksum else f"its checksum is {found:016x}, not {checksum:016x}"
