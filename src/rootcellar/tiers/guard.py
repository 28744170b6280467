"""``Guard``: what stands between whoever moves bytes and any store, so that a store can do no harm.

- An exception is a miss, counted, and logged once until the store works again.
- A call that takes longer than its deadline is given up. A store that ``verifies`` works in the caller's memory, so it
  is called with a few pages at a time, and no more after the deadline. Any other works in memory of the guard's own, on
  a thread of its own: a call that hangs is left behind, whatever it still does there. It may send from the caller's
  (``GatheringStore``) while the guard sums that up: what the caller changes later no longer fits, and is a miss.
- After some failures the store is left alone for a while, then tried with one call; each time that fails the pause is
  twice as long.
- Stores that keep no checksums get objects that do: a seal with the image's length and a checksum over name, length
  and bytes, then the image. What comes back and does not fit is a miss. Objects lie in memory that is used again and
  that the store was shown (``register``), so it may send from there and receive there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

from rootcellar.tiers.sealing import SEAL, Made, Scratch, room, seals_of, unseal
from rootcellar.tiers.store import Block, GatheringStore, Store, TimedStore, check_names
from rootcellar.tiers.threads import Threads

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_SUMMED = 1 << 20
"""Bytes of images that are summed up before the store is told: it sends them while caches still hold them."""


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """When a store is given up. Times are seconds."""

    deadline: float = 10.0
    """Of one call, whatever its pages."""
    pages_at_once: int = 32
    """Pages that a store that verifies is given at a time; the deadline is looked at between them."""
    failures: int = 3
    """In a row, after which the store is left alone."""
    pause: float = 1.0
    """For which it is, the first time."""
    longest_pause: float = 60.0
    """At most, however often it failed."""
    pages_apart: int = 128
    """Pages that any other is given at a time; what it does in one call is lost when that is late."""
    bytes_apart: int = 64 << 20
    """And so many bytes, or one page."""
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


@dataclass(frozen=True, slots=True)
class BreakerStats:
    """How often a store was left alone, and used again after that; ``away``: it is left alone now."""

    left_alone: int
    used_again: int
    away: bool


class _Breaker:
    """Whether a store is to be asked: yes, no, or once."""

    def __init__(self, settings: GuardSettings, now: Callable[[], float]) -> None:
        self._settings = settings
        self._now = now
        self._row = 0
        self._pause = settings.pause
        self._until = 0.0
        self._probing = False
        self._left_alone = self._used_again = 0

    @property
    def away(self) -> bool:
        """Whether it is left alone, but for a try after each pause."""
        return self._row >= self._settings.failures

    def stats(self) -> BreakerStats:
        """So far."""
        return BreakerStats(self._left_alone, self._used_again, self.away)

    @property
    def failures(self) -> int:
        """In a row."""
        return self._row

    def admits(self) -> bool:
        """Whether to ask it; whoever was told so says how it went."""
        if not self.away:
            return True
        if self._probing or self._now() < self._until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """It answered."""
        self._used_again += self.away
        self._row, self._pause, self._probing = 0, self._settings.pause, False

    def failed(self) -> None:
        """It did not."""
        before = self.away
        self._row += 1
        self._probing = False
        self._left_alone += self.away and not before
        if self.away:
            self._until = self._now() + self._pause
            self._pause = min(2 * self._pause, self._settings.longest_pause)

    def unknown(self) -> None:
        """It had too little time to tell. If it is left alone, it is for another pause."""
        self._probing = False
        if self.away:
            self._until = self._now() + self._pause


class _LeftBehind(TimeoutError):
    """A call did not end in time, and goes on."""


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
        self._spare: list[Scratch] = []
        self._threads = Threads(f"rootcellar-{name}")
        self._stats = {verb: StoreStats() for verb in ("has", "get", "put")}

    def has(self, names: Sequence[bytes], by: float | None = None) -> list[bool]:
        """See ``Store``. ``by``, here and below: the moment of ``now`` at which the call is to end, deadline or not."""
        check_names(names)

        def ask(some: slice, end: float) -> list[bool]:
            store = self._store
            if isinstance(store, TimedStore):
                return self._ask(lambda: store.has(names[some], end), end)
            return self._ask(lambda: store.has(names[some]), end)

        return self._each("has", [0] * len(names), ask, by)

    def get(self, names: Sequence[bytes], into: Sequence[memoryview], by: float | None = None) -> list[bool]:
        """See ``Store``."""
        check_names(names, into)
        views = [view.cast("B") for view in into]
        read = self._get_whole if self._store.verifies else self._get_sealed
        found = self._each("get", self._lengths(views), lambda some, end: read(names[some], views[some], end), by)
        self._count("get", nbytes=sum(len(view) for view, there in zip(views, found, strict=True) if there))
        return found

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview], by: float | None = None) -> list[bool]:
        """See ``Store``."""
        check_names(names, blocks)
        views = [block.cast("B") for block in blocks]
        write = self._put_whole if self._store.verifies else self._put_sealed
        held = self._each("put", self._lengths(views), lambda some, end: write(names[some], views[some], end), by)
        self._count("put", nbytes=sum(len(view) for view, there in zip(views, held, strict=True) if there))
        return held

    def clear(self) -> int:
        """See ``Store``. Whoever asks for it is told what goes wrong: the store's error, or ``TimeoutError``."""
        return self._apart(self._store.clear, self._now() + self._settings.deadline)

    def register(self, buffer: memoryview) -> None:
        """See ``Store``; stores that do not verify never write into the caller's memory."""
        if self._store.verifies or isinstance(self._store, GatheringStore):
            try:
                self._apart(lambda: self._store.register(buffer), self._now() + self._settings.deadline)
            except Exception as error:
                self._failed("register", error)

    def close(self) -> None:
        """See ``Store``; a store that hangs is left behind after the deadline."""
        try:
            self._apart(self._store.close, self._now() + self._settings.deadline)
        except Exception as error:
            self._failed("close", error)
        self._threads.close()

    def stats(self) -> dict[str, StoreStats]:
        """What became of the calls so far, by verb."""
        with self._lock:
            return {verb: replace(stats) for verb, stats in self._stats.items()}

    def breaker(self) -> BreakerStats:
        """How often the store was left alone so far."""
        with self._lock:
            return self._breaker.stats()

    # --- calls --------------------------------------------------------------------------------------------------------

    def _lengths(self, views: Sequence[memoryview]) -> list[int]:
        """Bytes that each needs of the guard's own memory."""
        return [0] * len(views) if self._store.verifies else [SEAL.size + len(view) for view in views]

    def _each(
        self, verb: str, lengths: Sequence[int], call: Callable[[slice, float], list[bool]], by: float | None = None
    ) -> list[bool]:
        """Answers for pages of these lengths, a few at a time; False for those that the store is not asked for.

        ``by``: a moment before the deadline at which the call is to end. Where that leaves less than half of the
        deadline, to be late then is no failure of the store's: others took the time.
        """
        count = len(lengths)
        answers: list[bool] = []
        began, own = self._now(), self._settings.deadline
        given = own if by is None else min(own, by - began)
        end, short = began + given, given < own / 2
        fine = False  # what it was asked last
        while len(answers) < count and (not answers or self._now() < end) and self._admitted(again=fine):
            asked = len(answers)
            some = slice(asked, asked + self._few(lengths[asked:]))
            try:
                got = [bool(there) for there in call(some, end)]
                if len(got) != some.stop - some.start:
                    raise RuntimeError(f"it answered for {len(got)} of {some.stop - some.start} pages")
            except Exception as error:
                got, fine = [False] * (some.stop - some.start), False
                if short and isinstance(error, _LeftBehind):
                    self._unknown()
                else:
                    self._failed(verb, error)
            else:
                fine = True
            answers += got
        asked, hits, seconds = len(answers), sum(answers), self._now() - began
        # What came in time is used, but a store that is late each time is to be left alone as one that fails.
        if fine and seconds >= (own if short else given):
            self._failed(verb, TimeoutError(f"it took {seconds:.3g} s for {asked} of {count} pages"))
        elif fine:
            self._succeeded()
        self._count(verb, 1, count, seconds=seconds, hits=hits, misses=asked - hits, skipped=count - asked)
        return answers + [False] * (count - asked)

    def _few(self, lengths: Sequence[int]) -> int:
        """How many of these pages one call gets."""
        if self._store.verifies:
            return min(len(lengths), self._settings.pages_at_once)
        some = lengths[: self._settings.pages_apart]
        return max(sum(total <= self._settings.bytes_apart for total in accumulate(some)), 1)

    def _get_whole(self, names: Sequence[bytes], into: Sequence[memoryview], end: float) -> list[bool]:
        store = self._store
        return store.get(names, into, end) if isinstance(store, TimedStore) else store.get(names, into)

    def _put_whole(self, names: Sequence[bytes], blocks: Sequence[memoryview], end: float) -> list[bool]:
        store = self._store
        return store.put(names, blocks, end) if isinstance(store, TimedStore) else store.put(names, blocks)

    def _get_sealed(self, names: Sequence[bytes], into: Sequence[memoryview], end: float) -> list[bool]:
        scratch = self._take(self._lengths(into))
        objects = scratch.split(self._lengths(into))
        found = self._in(scratch, lambda: self._store.get(names, objects), end)
        here = [i for i, there in enumerate(found[: len(names)]) if there]
        whole = unseal([names[i] for i in here], [objects[i] for i in here], [into[i] for i in here])
        for i, good in zip(here, whole, strict=True):
            found[i] = good
        self._count("get", damaged=whole.count(False))
        self._give(scratch)
        return found

    def _put_sealed(self, names: Sequence[bytes], blocks: Sequence[memoryview], end: float) -> list[bool]:
        store = self._store
        if isinstance(store, GatheringStore) and store.gathers(blocks):
            return self._put_parts(store, names, blocks, end)
        scratch = self._take(self._lengths(blocks))
        objects = scratch.split(self._lengths(blocks))
        images, made = [each[: -SEAL.size] for each in objects], Made()

        def seal() -> Iterator[int]:
            for each, sealed in zip(objects, seals_of(names, blocks, images), strict=True):
                each[-SEAL.size :] = sealed
            yield len(objects)

        def send() -> list[bool]:
            made.wait(len(objects))
            return store.put(names, objects)

        held = self._in(scratch, send, end, lambda: made.by(seal()))  # while the thread begins
        self._give(scratch)
        return held

    def _put_parts(
        self, store: GatheringStore, names: Sequence[bytes], images: Sequence[memoryview], end: float
    ) -> list[bool]:
        lengths = [SEAL.size] * len(images)
        scratch = self._take(lengths)
        seals, made = scratch.split(lengths), Made()

        def seal() -> Iterator[int]:
            done = 0
            while done < len(images):
                some = slice(done, done + max(_SUMMED // max(len(images[done]), 1), 1))
                for place, sealed in zip(seals[some], seals_of(names[some], images[some]), strict=True):
                    place[:] = sealed
                yield (done := min(some.stop, len(images)))

        def tail(i: int) -> Block:
            made.wait(i + 1)
            return seals[i]

        # Here: who was left behind would seal what may be another page by now.
        held = self._in(scratch, lambda: store.put_parts(names, images, tail), end, lambda: made.by(seal()))
        self._give(scratch)
        return held

    def _in(
        self,
        scratch: Scratch,
        call: Callable[[], list[bool]],
        end: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[bool]:
        """``call``, which works in ``scratch``: that is free again when it returns, whoever waits for it then."""

        def work() -> list[bool]:
            if not scratch.shown:
                self._store.register(scratch.memory)
                scratch.shown = True
            return call()

        try:
            return self._apart(work, end, lambda: self._give(scratch), meanwhile)
        except _LeftBehind:
            raise
        except BaseException:
            self._give(scratch)
            raise

    def _take(self, lengths: Sequence[int]) -> Scratch:
        nbytes = room(lengths)
        with self._lock:
            for i, scratch in enumerate(self._spare):
                if len(scratch.memory) >= nbytes:
                    return self._spare.pop(i)
        return Scratch(nbytes)

    def _give(self, scratch: Scratch) -> None:
        with self._lock:
            self._spare = sorted([*self._spare, scratch], key=lambda each: len(each.memory))
            del self._spare[: -self._settings.most_hanging]

    def _ask(self, call: Callable[[], list[bool]], end: float) -> list[bool]:
        return call() if self._store.verifies else self._apart(call, end)

    def _apart(
        self,
        call: Callable[[], _T],
        end: float,
        left: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> _T:
        """``call`` on a thread of its own. Raises ``TimeoutError`` when not over at ``end``, or what it raises.

        ``meanwhile`` is called here while it begins, ``left`` when it ends and nobody waits for it any longer.
        """
        answer: list[_T] = []
        errors: list[BaseException] = []
        over = threading.Event()
        behind = False

        def work() -> None:
            try:
                answer.append(call())
            except BaseException as error:
                errors.append(error)

        def after() -> None:
            with self._lock:
                self._hanging -= 1
                over.set()
                late = behind
            if late:
                left()

        with self._lock:
            self._hanging += 1
        self._threads.run(work, after)
        try:
            meanwhile()
        except BaseException as error:  # it is waited for all the same: it works in the same memory
            errors.append(error)
        if not over.wait(max(end - self._now(), 0.0)):
            with self._lock:
                behind = not over.is_set()
            if behind:
                raise _LeftBehind(f"it did not answer in time (its deadline is {self._settings.deadline:g} s)")
        if errors:
            raise errors[0]
        return answer[0]

    # --- what is known of it ------------------------------------------------------------------------------------------

    def _admitted(self, *, again: bool) -> bool:
        """Whether to ask it; ``again``: more of a call of which it did well what it was asked so far."""
        with self._lock:
            return self._hanging < self._settings.most_hanging and (again or self._breaker.admits())

    def _succeeded(self) -> None:
        with self._lock:
            failures = self._breaker.failures
            self._breaker.succeeded()
        if failures:
            _log.info("the %s works again, after %d failures in a row", self._name, failures)

    def _unknown(self) -> None:
        with self._lock:
            self._breaker.unknown()

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
