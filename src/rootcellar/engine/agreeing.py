"""Ranks agree on what their movers saw: the cache of each learns of a copy once all have made it.

A copy failed if it failed anywhere, and of what stores were found to have the least counts: a page that all of them
have. Every rank enters every agreement, with what it has seen since the last one, which may be nothing; so nobody waits
for a rank that has nothing to say. What has not been seen everywhere is kept for a later agreement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rootcellar.cache import Answer, Done, Event, Failed, Found, Move, Question, Reports
from rootcellar.engine.copies import AnyMover
from rootcellar.engine.exchange import Exchange
from rootcellar.errors import CacheBusy, ConfigError
from rootcellar.tiers.store import Store


@dataclass(frozen=True)
class Seen:
    """What a rank saw, or what all saw: moves that were done and that failed, and answers by serial.

    An answer has a byte for each page of its question: whether that is there.
    """

    done: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    held: tuple[tuple[int, bytes], ...] = ()


class Agreement:
    """What rank 0 knows of what so many ranks saw. It decides and does nothing else."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._moves: dict[int, list[bool]] = {}
        """Of moves that were not seen everywhere: whether each that was seen was done."""
        self._held: dict[int, list[bytes]] = {}

    def merge(self, seen: Sequence[Seen]) -> Seen:
        """Add what each rank saw since the last time; what is known of all ranks now, in the order of moves."""
        for each in seen:
            for move in each.done:
                self._moves.setdefault(move, []).append(True)
            for move in each.failed:
                self._moves.setdefault(move, []).append(False)
            for serial, held in each.held:
                self._held.setdefault(serial, []).append(held)
        whole = sorted(move for move, found in self._moves.items() if len(found) == self._ranks)
        well = {move: all(self._moves.pop(move)) for move in whole}
        answered = sorted(serial for serial, found in self._held.items() if len(found) == self._ranks)
        return Seen(
            tuple(move for move in whole if well[move]),
            tuple(move for move in whole if not well[move]),
            tuple((serial, _least(self._held.pop(serial))) for serial in answered),
        )


def _least(held: Sequence[bytes]) -> bytes:
    """What all have."""
    return np.logical_and.reduce([np.frombuffer(each, np.bool_) for each in held]).tobytes()


@dataclass(frozen=True, slots=True)
class PageByPage(Question):
    """A question whose answer is all that is there, and not only what can be used: ``held`` reads it."""

    def answer(self, held: Sequence[bool], _piece: int = 0) -> list[Found]:
        """The pages that are there, each run of them as one event; all of its own kind."""
        found: list[Found] = []
        at, size, total = 0, self.page_size, len(self.key) // self.page_size
        for kind, first in zip(self.kinds, self.firsts, strict=True):
            there = np.asarray(held[at : at + total - first], np.int8)
            edges = np.flatnonzero(np.diff(there, prepend=0, append=0)).tolist()
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                end, begin = (first + stop) * size, (first + start) * size
                found.append(Found(self.key[:end], self.tier, kind.name, begin))
            at += total - first
        return found

    @classmethod
    def of(cls, question: Question) -> PageByPage:
        """The same question."""
        q = question
        return cls(q.key, q.tier, q.kinds, q.page_size, q.reach, q.firsts, q.pages)

    def held(self, events: Sequence[Found]) -> bytes:
        """What :meth:`answer` was given, from what it gave; from nothing: nothing is there."""
        size, total = self.page_size, len(self.key) // self.page_size
        at, where = 0, {}
        for kind, first in zip(self.kinds, self.firsts, strict=True):
            where[kind.name] = at - first
            at += total - first
        there = np.zeros(at, np.bool_)
        for event in events:
            start = where[event.kind]
            there[start + (event.start or 0) // size : start + len(event.key) // size] = True
        return there.tobytes()


@dataclass(frozen=True)
class Unopened:
    """A store that a rank could not open, and why."""

    why: str


class AgreedMover:
    """The mover of one rank, as its machine sees it: it reports what all ranks saw.

    ``reports``, ``drain``, ``attach`` and ``detach`` are agreements: machines of all ranks call them in the same order.
    """

    def __init__(self, mover: AnyMover, exchange: Exchange) -> None:
        """``mover``: what copies here."""
        self._mover = mover
        self._exchange = exchange
        self._agreement = Agreement(exchange.ranks)
        self._asked: dict[int, PageByPage] = {}
        self._news = threading.Event()

    def take_news(self) -> bool:
        """Rank 0: whether a rank has seen something since this was asked last.

        Asked before the others are told to agree: what they see once they did must not be taken for what they told.
        """
        heard = self._news.is_set()
        if heard:
            self._news.clear()
        return heard

    def noted(self) -> None:
        """Rank 0: a rank has seen something."""
        self._news.set()

    def listen(self, wake: Callable[[], None]) -> None:
        """See ``AnyMover``; rank 0 is told instead, for whom others follow."""

        def own() -> None:
            if self._exchange.rank:
                self._exchange.news()
            else:
                self.noted()
                wake()

        self._mover.listen(own)

    def dispatch(self, moves: Sequence[Move], *, patient: bool = False) -> None:
        """See ``AnyMover``."""
        self._mover.dispatch(moves, patient=patient)

    def ask(self, serial: int, question: Question) -> None:
        """See ``AnyMover``."""
        self._asked[serial] = asked = PageByPage.of(question)
        self._mover.ask(serial, asked)

    def reports(self) -> Reports:
        """See ``AnyMover``."""
        return self._agreed(self._mover.reports())

    def drain(self, *, near: bool = False) -> Reports:
        """See ``AnyMover``; each rank waits for its own."""
        return self._agreed(self._mover.drain(near=near))

    def attach(self, store: Store | Unopened) -> None:
        """See ``AnyMover``. ``ConfigError`` where a rank has none: then none is attached anywhere."""
        why = f"rank {self._exchange.rank}: {store.why}" if isinstance(store, Unopened) else ""
        if whys := self._agree(why, lambda all: "; ".join(filter(None, all))):
            raise ConfigError(whys)
        assert not isinstance(store, Unopened)
        self._mover.attach(store)

    def leave(self) -> None:
        """See ``AnyMover``; of this rank alone."""
        self._mover.leave()

    def await_left(self, deadline: float) -> int:
        """See ``AnyMover``; of this rank alone."""
        return self._mover.await_left(deadline)

    def detach(self) -> Store | None:
        """See ``AnyMover``. ``CacheBusy``: the store of some rank has not returned."""
        if self._agree(self._mover.await_left(0.0), max):
            raise CacheBusy("a store has not returned on some rank")
        return self._mover.detach()

    def stats(self) -> dict[str, dict[str, Any]]:
        """See ``AnyMover``; of this rank alone."""
        return self._mover.stats()

    def _agreed(self, reports: Reports) -> Reports:
        """What all ranks saw, of whom this one saw ``reports``."""
        done = tuple(event.move for event in reports.events if isinstance(event, Done))
        failed = tuple(event.move for event in reports.events if isinstance(event, Failed))
        assert len(done) + len(failed) == len(reports.events), "movers tell of moves alone"
        held = tuple((each.serial, self._asked[each.serial].held(each.events)) for each in reports.answers)
        agreed: Seen = self._agree(Seen(done, failed, held), self._agreement.merge)
        events: list[Event] = [*map(Done, agreed.done), *map(Failed, agreed.failed)]
        return Reports(tuple(events), tuple(self._answer(*each) for each in agreed.held))

    def _answer(self, serial: int, held: bytes) -> Answer:
        asked = self._asked.pop(serial)
        return Answer(serial, tuple(Question.answer(asked, np.frombuffer(held, np.bool_).tolist())))

    def _agree(self, mine: Any, merge: Callable[[Sequence[Any]], Any]) -> Any:
        """What ``merge`` makes of what each rank brings, on all of them."""
        if self._exchange.rank:
            self._exchange.say(mine)
            return self._exchange.hear()
        agreed = merge([mine, *self._exchange.gather()])
        self._exchange.tell(agreed)
        return agreed
