"""NIXL's plugin ``POSIX``: a file a page in a folder, written from where the page lies, read into the guard's memory.

A file is written beside its place and then renamed. What is there is asked of the folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import nothing_else, take_choice, take_text
from rootcellar.tiers.store import Block, GatheringStore, Store, check_names
from rootcellar.tiers.stores import nixl_objects
from rootcellar.tiers.stores.nixl_agent import Agent, as_os_error
from rootcellar.tiers.stores.passage import Passage

_AT_ONCE = 128
"""Pages of one transfer, and files that are open for it."""
_NEW = os.O_RDWR | os.O_CREAT
_LARGE = 1 << 16
"""Bytes of an image from which on a call of the system for its tail costs less than a copy."""


@dataclass(frozen=True, slots=True)
class NixlSettings:
    """Of a store on NIXL."""

    path: Path
    timeout: float = 5.0
    """Seconds that a transfer may take."""


def read_settings(extra: Mapping[str, object]) -> NixlSettings:
    """What ``--hicache-storage-backend-extra-config`` says of it but ``plugin``. Raises ``ConfigError``."""
    own = dict(extra)
    settings = NixlSettings(Path(take_text(own, "path")).expanduser(), positive(own, "timeout", 5.0))
    nothing_else(own, "nixl", "plugin, path, timeout")
    return settings


class _Folder:
    """Where files lie; of each NIXL's descriptor (offset, length, file, more), None where it is not there.

    Names are put together by hand: a ``Path`` costs as much as opening the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._mine = uuid4().hex
        self._count = itertools.count()
        self._parts: dict[int, str] = {}
        self._allocates = _allocates(self._path)

    def _file(self, name: bytes) -> str:
        word = name.hex()
        return f"{self._path}/{word[:1]}/{word}"

    def has(self, names: Sequence[bytes]) -> list[bool]:
        return [os.path.exists(self._file(name)) for name in names]

    def reading(self, names: Sequence[bytes], sizes: Sequence[int], stack: ExitStack) -> list[Any]:
        found: list[Any] = []
        for name, size in zip(names, sizes, strict=True):
            try:
                fd = os.open(self._file(name), os.O_RDONLY)
            except FileNotFoundError:
                found.append(None)
                continue
            stack.callback(os.close, fd)
            found.append((0, size, fd, "") if os.fstat(fd).st_size == size else None)
        return found

    def writing(self, sizes: Sequence[int], stack: ExitStack) -> list[Any]:
        """Of new files, of which :meth:`written` has not been told."""
        made: list[Any] = []
        for size in sizes:
            part = f"{self._path}/{self._mine}{next(self._count)}.part"
            try:
                fd = os.open(part, _NEW, 0o600)
            except FileNotFoundError:  # somebody took the folder away
                os.makedirs(self._path, exist_ok=True)
                fd = os.open(part, _NEW, 0o600)
            self._parts[fd] = part
            stack.callback(self._end, fd)
            if self._allocates:  # at once: block by block, as NIXL writes, takes longer than copying the bytes
                os.posix_fallocate(fd, 0, size)
            made.append((0, size, fd, ""))
        return made

    def written(self, names: Sequence[bytes], descriptors: Sequence[Any], tails: Iterable[Block]) -> None:
        for name, (_, size, fd, _), tail in zip(names, descriptors, tails, strict=True):
            if len(tail) and os.pwrite(fd, tail, size) != len(tail):
                raise OSError("the disk is full")
            place = self._file(name)
            try:
                os.replace(self._parts[fd], place)
            except FileNotFoundError:  # the first of its folder
                os.makedirs(os.path.dirname(place), exist_ok=True)
                os.replace(self._parts[fd], place)
            del self._parts[fd]

    def _end(self, fd: int) -> None:
        """Close a file that was to be written, and take it away unless it was."""
        part = self._parts.pop(fd, None)
        os.close(fd)
        if part is not None:
            with suppress(FileNotFoundError):  # whoever empties the folder may have
                os.unlink(part)


def _allocates(path: str) -> bool:
    """Whether room for a file can be asked for in this folder.

    Where it cannot, the C library writes to every block instead, but not in files that are appended to.
    """
    probe = f"{path}/{uuid4().hex}.part"
    fd = os.open(probe, _NEW | os.O_APPEND, 0o600)
    try:
        os.unlink(probe)
        os.posix_fallocate(fd, 0, 1)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class NixlStore(GatheringStore):
    """A :class:`~rootcellar.tiers.store.Store` on NIXL's plugin ``POSIX``."""

    verifies = False

    def __init__(self, settings: NixlSettings) -> None:
        """Raises ``ConfigError``: NIXL or its plugin is missing, or the folder cannot be made."""
        self.settings = settings
        try:
            settings.path.mkdir(parents=True, exist_ok=True)
            self._folder = _Folder(settings.path)
        except OSError as error:
            raise ConfigError(f"path={str(settings.path)!r} cannot be used: {error.strerror}") from None
        self._reader, self._writer = (Agent("POSIX", {}, settings.timeout) for _ in range(2))
        self._passage = Passage()

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)
        with self._passage:
            return self._folder.has(names)

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)
        views = [view.cast("B") for view in into]
        found: list[bool] = []
        with self._passage:
            for start in range(0, len(names), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                with self._reader.lock, ExitStack() as stack, as_os_error():
                    found += self._read(names[some], views[some], stack)
        return found

    def _read(self, names: Sequence[bytes], views: Sequence[memoryview], stack: ExitStack) -> list[bool]:
        descriptors = self._folder.reading(names, [len(view) for view in views], stack)
        here = [i for i, each in enumerate(descriptors) if each is not None]
        if not here:
            return [False] * len(names)
        if self._moved([views[i] for i in here], [descriptors[i] for i in here]):
            return [each is not None for each in descriptors]
        # One of them cannot be read: all the others can.
        alone = [i for i in here if self._moved([views[i]], [descriptors[i]])]
        if not alone:
            raise OSError("NIXL could read nothing of what is there")
        return [i in alone for i in range(len(names))]

    def _moved(self, views: Sequence[memoryview], descriptors: Sequence[Any]) -> bool:
        return all(self._reader.move("READ", views, "FILE", descriptors))

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        return self.put_parts(names, blocks, lambda _: b"")

    def gathers(self, images: Sequence[memoryview]) -> bool:
        """See ``GatheringStore``: from any memory, but what is small is copied as fast."""
        return min(map(len, images), default=0) >= _LARGE

    def put_parts(
        self, names: Sequence[bytes], images: Sequence[memoryview], tail: Callable[[int], Block]
    ) -> list[bool]:
        """See ``GatheringStore``. Raises ``OSError``."""
        check_names(names, images)
        views = [image.cast("B") for image in images]
        with self._passage:
            for start in range(0, len(names), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                with self._writer.lock, as_os_error(), ExitStack() as stack:
                    descriptors = self._folder.writing([len(view) for view in views[some]], stack)
                    if not all(self._writer.move("WRITE", views[some], "FILE", descriptors)):
                        raise OSError("NIXL could not write")
                    self._folder.written(names[some], descriptors, map(tail, range(len(names))[some]))
        return [True] * len(names)

    def clear(self) -> int:
        """See ``Store``."""
        with self._passage:
            pages = [path for path in self.settings.path.glob("?/*") if not path.suffix]
            for path in pages:
                path.unlink(missing_ok=True)
        return len(pages)

    def register(self, _buffer: memoryview) -> None:
        """Registering costs this plugin nothing, so each transfer does it."""

    def close(self) -> None:
        """See ``Store``; calls that are under way end first."""
        self._passage.shut()


def open_store(extra: Mapping[str, object], _identity: str) -> Store:
    """See ``registry``. ``plugin`` says which."""
    own = dict(extra)
    if take_choice(own, "plugin", ("POSIX", "OBJ"), "POSIX") == "OBJ":
        return nixl_objects.NixlObjectStore(nixl_objects.read_settings(own))
    return NixlStore(read_settings(own))
