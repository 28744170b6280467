"""A store behind the mover: pages go there from host memory and come back, by name, and it is asked what it holds.

Writing, reading and asking have a thread each, so none waits for another. A call of a store may take any time and may
never return: what it works on is not reported before it did, since it lies in host rows that would be used again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Generic, TypeVar

from rootcellar.cache import Answer, Done, Event, Failed, Found, Move, Question, Tier
from rootcellar.pools.images import Images
from rootcellar.tiers.lane import LaneStats
from rootcellar.tiers.news import News
from rootcellar.tiers.store import Store, page_name
from rootcellar.units import gb

log = logging.getLogger(__name__)

PAGES_AT_ONCE = 128
"""Pages of one call."""
STALLED = 30.0
"""Seconds without a word from a store after which nobody waits for it: more than a guard gives one call."""
_T = TypeVar("_T")


class _Line(Generic[_T]):
    """What waits for calls of one kind, and the thread that makes them. Changed under the lock of ``news``.

    Attributes:
        waiting: not begun.
        group: begun and not told; ``inside``: its pages in a call that has not returned.
        stats: what was moved; of questions nothing is counted here.
    """

    def __init__(
        self,
        name: str,
        news: News,
        stats: LaneStats,
        pages_of: Callable[[_T], int],
        carry: Callable[[_Line[_T]], None],
    ) -> None:
        """``carry(line)``, on the thread: do and tell what is in ``line.group``."""
        self.stats = stats
        self.waiting: deque[_T] = deque()
        self.group: list[_T] = []
        self.inside = 0
        self._news, self._pages_of, self._carry = news, pages_of, carry
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"rootcellar-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the thread end when nothing waits; wait for that unless it is in a call."""
        with self._news.changed:
            self._closed = True
            self._news.changed.notify_all()
            stuck = bool(self.group)
        if not stuck:
            self._thread.join()

    def _run(self) -> None:
        while self._next():
            self._carry(self)

    def _next(self) -> bool:
        """Wait for the next group: one thing, and what follows as far as one call takes it. False: none will come."""
        with self._news.changed:
            self._news.changed.wait_for(lambda: self.waiting or self._closed)
            pages = 0
            while self.waiting:
                pages += self._pages_of(self.waiting[0])
                if self.group and pages > PAGES_AT_ONCE:
                    break
                self.group.append(self.waiting.popleft())
            return bool(self.group)


class Storage:
    """Moves between host memory and one store, and questions to it, from when it is attached until it has left."""

    def __init__(
        self,
        store: Store,
        host: Mapping[str, Images],
        pool_of: Mapping[str, str],
        news: News,
        writes: LaneStats,
        reads: LaneStats,
        most_queued: int,
    ) -> None:
        """``host`` and ``pool_of``: see ``Mover``. ``writes``, ``reads``: where what is done is counted.

        ``most_queued``: bytes that wait to be written at most, or what one move has.
        """
        self.store = store
        self.leaving = False
        self._host, self._pool_of, self._news = host, pool_of, news
        self._most_queued = most_queued
        self._given_up = False
        """Whether nothing more is begun, and what is inside the store is waited for by nobody."""
        self._said = False
        """Whether somebody was told that pages were left out."""
        self._registering = threading.Lock()
        self._registered = False
        self._writes = _Line[Move]("host-storage", news, writes, _pages_of, self._carry)
        self._reads = _Line[Move]("storage-host", news, reads, _pages_of, self._carry)
        self._questions = _Line[tuple[int, Question]](
            "storage-questions", news, LaneStats(), lambda asked: max(len(asked[1].pages), PAGES_AT_ONCE), self._answer
        )
        self._lines = self._writes, self._reads, self._questions

    # -- any thread -------------------------------------------------------------------------------------------------

    def write(self, moves: Iterable[Move], patient: bool) -> None:
        """Write host pages into the store; what finds too much waiting fails, unless ``patient``."""
        skipped: list[Event] = []
        for move in moves:
            nbytes = self._bytes_of(move)
            with self._news.changed:
                if not self.leaving and self._room_for(nbytes, patient):
                    self._put(self._writes, move)
                    self._writes.stats.queued_bytes += nbytes
                    continue
                self._writes.stats.skipped_pages += len(move.src_slots)
            skipped.append(Failed(move.id))
        if skipped:
            self._news.tell(skipped)
            self._say_so()

    def _say_so(self) -> None:
        """Log, once, that pages were left out."""
        if not (self._said or self.leaving):
            self._said = True
            log.warning(
                "the store writes more slowly than pages come: with %s GB in line more are left out, and written when "
                "the next request leaves them; rootcellar_skipped_pages_total counts them",
                gb(self._most_queued),
            )

    def read(self, moves: Iterable[Move]) -> None:
        """Read pages of the store into host memory."""
        with self._news.changed:
            for move in moves:
                if self.leaving:
                    self._reads.stats.skipped_pages += len(move.src_slots)
                    self._news.tell([Failed(move.id)])
                else:
                    self._put(self._reads, move)
                    self._reads.stats.queued_bytes += self._bytes_of(move)

    def ask(self, serial: int, question: Question) -> None:
        """Ask the store; with nothing for an answer when it is leaving."""
        with self._news.changed:
            if self.leaving:
                self._news.tell(answers=[Answer(serial, ())])
            else:
                self._put(self._questions, (serial, question))

    def leave(self) -> None:
        """Take nothing more. What was asked and not begun is answered with nothing."""
        with self._news.changed:
            self.leaving = True
            asked = list(self._questions.waiting)
            self._questions.waiting.clear()
            self._news.tell(answers=[Answer(serial, ()) for serial, _ in asked], ended=len(asked))

    def await_left(self, deadline: float) -> int:
        """Wait so many seconds until nothing is under way, then give up what was not begun.

        Returns the pages that are inside a call still; 0: the store is free.
        """
        with self._news.changed:
            self._news.changed.wait_for(lambda: not self.busy, deadline)
            if self.busy and not self._given_up:
                self._give_up()
            # What is between two calls ends by itself now: only calls may take any time.
            self._news.changed.wait_for(lambda: all(line.inside or not line.group for line in self._lines))
            return sum(line.inside for line in self._lines)

    def close(self) -> None:
        """End the threads. One that is inside the store is left behind, and ends when its call returns."""
        for line in self._lines:
            line.close()

    @property
    def under_way(self) -> int:
        """Moves and questions of which is yet to be told, but for those that nobody waits for."""
        with self._news.changed:
            return sum(len(line.waiting) + (0 if self._given_up else len(line.group)) for line in self._lines)

    @property
    def busy(self) -> bool:
        """Whether anything is under way; read without the lock, it may be so no longer."""
        return any(line.waiting or line.group for line in self._lines)

    def _give_up(self) -> None:
        self._given_up = True
        failed: list[Event] = []
        for line in (self._writes, self._reads):
            for move in line.waiting:
                failed.append(Failed(move.id))
                line.stats.deadline_pages += len(move.src_slots)
                line.stats.queued_bytes -= self._bytes_of(move)
            line.waiting.clear()
        # Nobody who waits for copies waits for what may never return.
        self._news.under_way -= len(self._writes.group) + len(self._reads.group)
        answers = [Answer(serial, ()) for serial, _ in self._questions.group]
        self._news.tell(failed, answers, ended=len(failed) + len(answers))

    def _put(self, line: _Line[_T], item: _T) -> None:
        line.waiting.append(item)
        self._news.under_way += 1
        self._news.changed.notify_all()

    def _room_for(self, nbytes: int, patient: bool) -> bool:
        """Whether so much may be queued; ``patient``: it may, sooner or later, unless the store leaves or hangs."""
        stats = self._writes.stats
        while stats.queued_bytes and stats.queued_bytes + nbytes > self._most_queued:
            if not patient or self.leaving or not self._news.changed.wait(STALLED):
                return False
        return not self.leaving

    def _bytes_of(self, move: Move) -> int:
        return len(move.src_slots) * int(self._host[self._pool_of[move.kind]].shape[1])

    # -- the threads of the lines -------------------------------------------------------------------------------------

    def _carry(self, line: _Line[Move]) -> None:
        """Move a group: several moves in one call, or one in several calls, of which each needs all before it."""
        began = perf_counter()
        call = self.store.put if line is self._writes else self.store.get
        held: list[bool] = []
        try:
            names = [page_name(move.kind, digest) for move in line.group for digest in move.digests]
            rows = [row for move in line.group for row in self._rows_of(move)]
            for start in range(0, len(names), PAGES_AT_ONCE):
                some = slice(start, start + PAGES_AT_ONCE)
                if not self._enters(line, len(names[some])):
                    break
                self._register()
                got = [bool(there) for there in call(names[some], rows[some])]
                if len(got) != len(names[some]):
                    raise RuntimeError(f"it answered for {len(got)} of {len(names[some])} pages")
                held += got
                if not all(got):
                    break
        except Exception as error:  # whatever it was, the next may succeed
            log.warning("%d moves to or from the store failed: %r", len(line.group), error)
        self._tell(line, held, perf_counter() - began)

    def _rows_of(self, move: Move) -> Iterable[memoryview]:
        slots = move.src_slots if move.src is Tier.HOST else move.dst_slots
        images = self._host[self._pool_of[move.kind]]
        return (memoryview(images[slot - 1]) for slot in slots.tolist())

    def _enters(self, line: _Line[_T], pages: int) -> bool:
        """A call with so many pages is about to be made, unless the time is up."""
        with self._news.changed:
            line.inside = 0 if self._given_up else pages
            return not self._given_up

    def _register(self) -> None:
        """Show the store where all images lie, once."""
        with self._registering:
            for images in () if self._registered else self._host.values():
                if images.size:
                    self.store.register(images.reshape(-1).data)
            self._registered = True

    def _tell(self, line: _Line[Move], held: Sequence[bool], seconds: float) -> None:
        events: list[Event] = []
        stats = line.stats
        at = 0
        with self._news.changed:
            for move in line.group:
                pages, nbytes = len(move.src_slots), self._bytes_of(move)
                done = len(held) >= at + pages and all(held[at : at + pages])
                at += pages
                stats.queued_bytes -= nbytes
                if done:
                    stats.moves += 1
                    stats.pages += pages
                    stats.bytes += nbytes
                elif self._given_up:
                    stats.deadline_pages += pages
                else:
                    stats.failed_pages += pages
                events.append(Done(move.id) if done else Failed(move.id))
            stats.seconds += seconds
            line.group, line.inside = [], 0
            self._news.tell(events, ended=0 if self._given_up else len(events))

    def _answer(self, line: _Line[tuple[int, Question]]) -> None:
        ((serial, question),) = line.group
        events: tuple[Found, ...] = ()
        try:
            names = [page_name(kind, digest) for kind, digest in question.pages]
            if self._enters(line, len(names)):
                held = self.store.has(names)
                if len(held) != len(names):
                    raise RuntimeError(f"it answered for {len(held)} of {len(names)} pages")
                events = tuple(question.answer(held))
        except Exception as error:
            log.warning("a question to the store failed: %r", error)
        with self._news.changed:
            line.group, line.inside = [], 0
            if not self._given_up:
                self._news.tell(answers=[Answer(serial, () if self.leaving else events)], ended=1)
            self._news.changed.notify_all()


def _pages_of(move: Move) -> int:
    return len(move.src_slots)
