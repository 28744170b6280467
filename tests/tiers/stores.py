"""Stores for tests: one in memory, and pages whose bytes follow from their names."""

import threading
from collections.abc import Sequence
from pathlib import Path

from rootcellar.tiers.conformance.pages import get, image, name, put, room
from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import FileSettings

__all__ = ["MemoryStore", "ToldStore", "file_store", "fill", "get", "image", "name", "put", "room"]


def file_store(path: Path, **settings) -> FileStore:
    now = settings.pop("now", None)
    made = FileSettings(path, **{"min_free_space": 0, "max_size": 16 << 20} | settings)
    return FileStore(made) if now is None else FileStore(made, now)


def fill(store, pages: Sequence[int], nbytes: int = 5000) -> None:
    """Put them ten at a time, as movers do: in one call, later pages never make room by those before them."""
    for start in range(0, len(pages), 10):
        put(store, pages[start : start + 10], nbytes)


class MemoryStore:
    """A store in a dict, which trusts its medium as most do."""

    verifies = False

    def __init__(self, objects: dict[bytes, bytes] | None = None):
        self.objects = {} if objects is None else objects

    def has(self, names):
        check_names(names)
        return [n in self.objects for n in names]

    def get(self, names, into):
        check_names(names, into)
        found = []
        for n, view in zip(names, into, strict=True):
            held = self.objects.get(n)
            found.append(held is not None and len(held) == len(view))
            if found[-1]:
                view.cast("B")[:] = held
        return found

    def put(self, names, blocks):
        check_names(names, blocks)
        for n, block in zip(names, blocks, strict=True):
            self.objects[n] = bytes(block)
        return [True] * len(names)

    def clear(self):
        count = len(self.objects)
        self.objects.clear()
        return count

    def register(self, buffer):
        pass

    def close(self):
        pass


class ToldStore:
    """A store that does as it is told: ``error`` is raised, ``answer`` returned, ``gate`` waited for, ``work`` done."""

    def __init__(self, inner):
        self.inner, self.verifies = inner, inner.verifies
        self.error = self.answer = self.gate = None
        self.work = lambda: None
        self.calls = 0
        self.entered, self.idle = threading.Event(), threading.Event()
        self.entries = threading.Semaphore(0)
        self._under_way = 0
        self._lock = threading.Lock()

    def _do(self, call):
        with self._lock:
            self.calls += 1
            self._under_way += 1
            self.idle.clear()
        try:
            if self.gate is not None:
                self.entered.set()
                self.entries.release()
                assert self.gate.wait(60)
            self.work()
            if self.error is not None:
                raise self.error
            return call() if self.answer is None else self.answer
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self.idle.set()

    def has(self, names):
        return self._do(lambda: self.inner.has(names))

    def get(self, names, into):
        return self._do(lambda: self.inner.get(names, into))

    def put(self, names, blocks):
        return self._do(lambda: self.inner.put(names, blocks))

    def clear(self):
        return self._do(self.inner.clear)

    def register(self, buffer):
        self.inner.register(buffer)

    def close(self):
        self._do(self.inner.close)
