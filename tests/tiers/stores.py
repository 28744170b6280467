"""Stores for tests: one in memory, and pages whose bytes follow from their names."""

import functools
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import FileSettings


@functools.lru_cache(8192)
def name(i: int) -> bytes:
    return hashlib.sha256(b"name %d" % i).digest()


@functools.lru_cache(4096)
def image(i: int, nbytes: int = 5000) -> memoryview:
    """The only bytes that may ever be returned for ``name(i)``."""
    return memoryview(np.random.default_rng([i, nbytes]).bytes(nbytes))


def room(nbytes: int = 5000) -> memoryview:
    return memoryview(bytearray(b"\xaa" * nbytes))


def file_store(path: Path, **settings) -> FileStore:
    now = settings.pop("now", None)
    made = FileSettings(path, **{"min_free_space": 0, "max_size": 16 << 20} | settings)
    return FileStore(made) if now is None else FileStore(made, now)


def get(store, i: int, nbytes: int = 5000) -> bool:
    """Whether the page is there; it is right then."""
    into = room(nbytes)
    (found,) = store.get([name(i)], [into])
    assert not found or into == image(i, nbytes), f"wrong bytes for page {i}"
    return found


def put(store, pages: Sequence[int], nbytes: int = 5000) -> list[bool]:
    return store.put([name(i) for i in pages], [image(i, nbytes) for i in pages])


def fill(store, pages: Sequence[int], nbytes: int = 5000) -> None:
    """Put them ten at a time, as movers do: in one call, later pages never make room by those before them."""
    for start in range(0, len(pages), 10):
        put(store, pages[start : start + 10], nbytes)


class MemoryStore:
    """A store in a dict, which trusts its medium as most do."""

    verifies = False

    def __init__(self):
        self.objects: dict[bytes, bytes] = {}

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
                view[:] = held
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
        self._do(lambda: self.inner.register(buffer))

    def close(self):
        self._do(self.inner.close)
