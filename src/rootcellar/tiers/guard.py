"""``Guard``: what stands between whoever moves bytes and any store, so that a store can do no harm.

- An exception is a miss, counted, and logged once until the store works again.
- A call that takes longer than its deadline is given up. A store that ``verifies`` works in the caller's memory, so it
  is called with a few pages at a time, and no more after the deadline. Any other works in memory of the guard's own, on
  a thread of its own: a call that hangs is left behind, whatever it still does there.
- After some failures the store is left alone for a while, then tried with one call; each time that fails the pause is
  twice as long.
- Stores that keep no checksums get objects that do: a header with the image's length and a checksum over name, length
  and bytes, then the image. What comes back and does not fit is a miss.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import xxhash

from rootcellar.tiers.store import Store, check_names

_HEADER = struct.Struct("<8sQQ8x")
_MAGIC = b"rcimage1"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """When a store is given up. Times are seconds."""

    deadline: float = 10.0
    """Of one call, whatever its pages."""
    pages_at_once: int = 32
    """Pages that the store is given at a time; the deadline is looked at between them."""
    failures: int = 3
    """In a row, after which the store is left alone."""
    pause: float = 1.0
    """For which it is, the first time."""
    longest_pause: float = 60.0
    most_hanging: int = 4
    """Calls that may hang; the store is left alone while so many do."""


@dataclass(slots=True)
class StoreStats:
    """What became of the calls of one kind."""

    calls: int = 0
    pages: int = 0
    bytes: int = 0
    """Of images that were read, or confirmed when written."""
    seconds: float = 0.0
    """Inside the store."""
    hits: int = 0
    """Pages that were there; of ``put``, that are there now."""
    misses: int = 0
    failures: int = 0
    """Exceptions, answers of the wrong form, and deadlines."""
    skipped: int = 0
    """Pages that the store was not asked for, since it was left alone or the deadline was over."""
    damaged: int = 0
    """Pages that came back and were not what their names say."""


class _Breaker:
    """Whether a store is to be asked: yes, no, or once."""

    def __init__(self, settings: GuardSettings, now: Callable[[], float]) -> None:
        self._settings = settings
        self._now = now
        self._row = 0
        self._pause = settings.pause
        self._until = 0.0
        self._probing = False

    @property
    def failures(self) -> int:
        """In a row."""
        return self._row

    def admits(self) -> bool:
        """Whether to ask it; who was told so says how it went."""
        if self._row < self._settings.failures:
            return True
        if self._probing or self._now() < self._until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """It answered."""
        self._row, self._pause, self._probing = 0, self._settings.pause, False

    def failed(self) -> None:
        """It did not."""
        self._row += 1
        self._probing = False
        if self._row >= self._settings.failures:
            self._until = self._now() + self._pause
            self._pause = min(2 * self._pause, self._settings.longest_pause)


class Guard:
    """A :class:`~rootcellar.tiers.store.Store` that raises nothing but ``ValueError`` for what no store takes."""

    verifies = True

    def __init__(
        self,
        store: Store,
        settings: GuardSettings | None = None,
        *,
        name: str = "store",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Around ``store``, which the log calls ``name``. ``now``: seconds since any moment."""
        self._store = store
        self._settings = settings or GuardSettings()
        self._name = name
        self._now = now
        self._lock = threading.Lock()
        self._breaker = _Breaker(self._settings, now)
        self._hanging = 0
        self._stats = {verb: StoreStats() for verb in ("has", "get", "put")}

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``."""
        check_names(names)
        return self._each("has", len(names), lambda some, end: self._ask(lambda: self._store.has(names[some]), end))

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``."""
        check_names(names, into)
        views = [view.cast("B") for view in into]
        read = self._get_whole if self._store.verifies else self._get_sealed
        found = self._each("get", len(names), lambda some, end: read(names[some], views[some], end))
        self._count("get", nbytes=sum(len(view) for view, there in zip(views, found, strict=True) if there))
        return found

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``."""
        check_names(names, blocks)
        views = [block.cast("B") for block in blocks]
        write = self._put_whole if self._store.verifies else self._put_sealed
        held = self._each("put", len(names), lambda some, end: write(names[some], views[some], end))
        self._count("put", nbytes=sum(len(view) for view, there in zip(views, held, strict=True) if there))
        return held

    def clear(self) -> int:
        """See ``Store``. Whoever asks for it is told what goes wrong: the store's error, or ``TimeoutError``."""
        return self._apart(self._store.clear, self._now() + self._settings.deadline)

    def register(self, buffer: memoryview) -> None:
        """See ``Store``; stores that do not verify never see the caller's memory."""
        if self._store.verifies:
            try:
                self._store.register(buffer)
            except Exception as error:
                self._failed("register", error)

    def close(self) -> None:
        """See ``Store``; a store that hangs is left behind after the deadline."""
        try:
            self._apart(self._store.close, self._now() + self._settings.deadline)
        except Exception as error:
            self._failed("close", error)

    def stats(self) -> dict[str, StoreStats]:
        """What became of the calls so far, by verb."""
        with self._lock:
            return {verb: replace(stats) for verb, stats in self._stats.items()}

    # --- calls --------------------------------------------------------------------------------------------------------

    def _each(self, verb: str, count: int, call: Callable[[slice, float], list[bool]]) -> list[bool]:
        """Answers for ``count`` pages, a few at a time; False for those that the store is not asked for."""
        answers: list[bool] = []
        began = self._now()
        end = began + self._settings.deadline
        asked = 0
        while asked < count and (asked == 0 or self._now() < end) and self._admitted():
            some = slice(asked, min(asked + self._settings.pages_at_once, count))
            try:
                got = [bool(there) for there in call(some, end)]
                if len(got) != some.stop - some.start:
                    raise RuntimeError(f"it answered for {len(got)} of {some.stop - some.start} pages")
            except Exception as error:
                got = [False] * (some.stop - some.start)
                self._failed(verb, error)
            else:
                self._succeeded()
            answers += got
            asked = some.stop
        late = asked < count and self._now() >= end
        if late:
            self._failed(verb, TimeoutError(f"{count - asked} of {count} pages were left at its deadline"))
        hits = sum(answers)
        self._count(verb, 1, count, seconds=self._now() - began, hits=hits, misses=asked - hits, skipped=count - asked)
        return answers + [False] * (count - asked)

    def _get_whole(self, names: Sequence[bytes], into: Sequence[memoryview], _end: float) -> list[bool]:
        return self._store.get(names, into)

    def _put_whole(self, names: Sequence[bytes], blocks: Sequence[memoryview], _end: float) -> list[bool]:
        return self._store.put(names, blocks)

    def _get_sealed(self, names: Sequence[bytes], into: Sequence[memoryview], end: float) -> list[bool]:
        objects = [memoryview(bytearray(_HEADER.size + len(view))) for view in into]
        found = self._apart(lambda: self._store.get(names, objects), end)
        for i, (name, view) in enumerate(zip(names, into, strict=True)):
            if i < len(found) and found[i]:
                image = objects[i][_HEADER.size :]
                found[i] = bytes(objects[i][: _HEADER.size]) == _seal(name, image)
                if found[i]:
                    view[:] = image
                else:
                    self._count("get", damaged=1)
        return found

    def _put_sealed(self, names: Sequence[bytes], blocks: Sequence[memoryview], end: float) -> list[bool]:
        objects = [memoryview(_seal(name, block) + block) for name, block in zip(names, blocks, strict=True)]
        return self._apart(lambda: self._store.put(names, objects), end)

    def _ask(self, call: Callable[[], list[bool]], end: float) -> list[bool]:
        return call() if self._store.verifies else self._apart(call, end)

    def _apart(self, call: Callable[[], _T], end: float) -> _T:
        """``call`` on a thread of its own. Raises ``TimeoutError`` when not over at ``end``, or what it raises."""
        answer: list[_T] = []
        errors: list[BaseException] = []
        over = threading.Event()

        def work() -> None:
            try:
                answer.append(call())
            except BaseException as error:
                errors.append(error)
            with self._lock:
                self._hanging -= 1
            over.set()

        with self._lock:
            self._hanging += 1
        threading.Thread(target=work, name=f"rootcellar-{self._name}", daemon=True).start()
        if not over.wait(max(end - self._now(), 0.0)):
            raise TimeoutError(f"it did not answer within {self._settings.deadline:g} s")
        if errors:
            raise errors[0]
        return answer[0]

    # --- what is known of it ------------------------------------------------------------------------------------------

    def _admitted(self) -> bool:
        with self._lock:
            return self._hanging < self._settings.most_hanging and self._breaker.admits()

    def _succeeded(self) -> None:
        with self._lock:
            failures = self._breaker.failures
            self._breaker.succeeded()
        if failures:
            _log.info("the %s works again, after %d failures in a row", self._name, failures)

    def _failed(self, verb: str, error: Exception) -> None:
        with self._lock:
            first = self._breaker.failures == 0
            self._breaker.failed()
            if verb in self._stats:
                self._stats[verb].failures += 1
        if first:
            said = "the %s failed (%s): %r; its pages count as missing until it works again"
            _log.warning(said, self._name, verb, error)

    def _count(
        self,
        verb: str,
        calls: int = 0,
        pages: int = 0,
        *,
        nbytes: int = 0,
        seconds: float = 0.0,
        hits: int = 0,
        misses: int = 0,
        skipped: int = 0,
        damaged: int = 0,
    ) -> None:
        with self._lock:
            stats = self._stats[verb]
            stats.calls += calls
            stats.pages += pages
            stats.bytes += nbytes
            stats.seconds += seconds
            stats.hits += hits
            stats.misses += misses
            stats.skipped += skipped
            stats.damaged += damaged


def _seal(name: bytes, image: memoryview) -> bytes:
    """The header of an object."""
    length = len(image)
    seed = xxhash.xxh3_64_intdigest(_MAGIC + length.to_bytes(8, "little") + name)
    return _HEADER.pack(_MAGIC, length, xxhash.xxh3_64_intdigest(image, seed))
