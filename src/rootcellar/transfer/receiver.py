"""A decode node's side: a thread for each request that another node computes the prompt of, which takes its pages.

To the mover a peer is one more place that is read from: ``read`` takes moves whose source is on PEER, and tells what
became of each like that of any other. A page goes from the wire to the row of host memory that the cache chose for it.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

import xxhash

from rootcellar.cache import Done, Event, Failed, Move
from rootcellar.pools.images import Images
from rootcellar.scheduler import Room
from rootcellar.tiers.mover import Mover
from rootcellar.transfer.bootstrap import Route, find
from rootcellar.transfer.talk import PageName, Patience, Say, Talk, indices_of, lent_read, pages_said
from rootcellar.transfer.terms import Terms
from rootcellar.transfer.wires import tcp
from rootcellar.transfer.wires.tcp import AnySocket, WireError
from rootcellar.transfer.wires.wire import PageWire

log = logging.getLogger(__name__)

_CLOSING = 5.0
"""Seconds for which :meth:`Receiver.close` waits for threads that look for a prefill node."""


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The prefill node has the request: its pages may be asked for. ``visit``: see :meth:`Receiver.join`."""

    visit: int


@dataclass(frozen=True, slots=True)
class Parted:
    """Nothing more will come of a visit."""

    visit: int
    why: str


ReceiverEvent = Welcomed | Parted


@dataclass(slots=True)
class _Open:
    """A move of which ``left`` pages have not come."""

    move: int
    pages: int
    left: int


@dataclass(slots=True, eq=False)
class _Visit:
    serial: int
    room: Room
    weights: str
    last: str
    start: int
    promised: frozenset[PageName] = frozenset()
    talk: Talk | None = None
    lends: str = ""
    """The address of the prefill node's wire."""
    left: bool = False
    """Whether nobody waits for it any more; ``satisfied``: because all that was needed has come."""
    satisfied: bool = False
    ended: bool = False
    """Whether its thread takes nothing more."""
    wanted: list[tuple[_Open, memoryview]] = field(default_factory=list)
    """By index: what a page is part of, and where it goes."""
    came: set[int] = field(default_factory=set)
    """Indices of pages that have come: what is there is not written again."""
    open: dict[int, _Open] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    """Moves that whoever comes to rest waits for: those that end soon, since nobody else does."""


@dataclass(slots=True)
class ReceiverStats:
    """What came; ``seconds``: in which a frame of pages was being received."""

    visits: int = 0
    moves: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failed_pages: int = 0
    lost_visits: int = 0


class Receiver:
    """Takes pages from prefill nodes."""

    def __init__(
        self,
        terms: Terms,
        host: Mapping[str, Images],
        mover: Mover,
        patience: Patience | None = None,
        wrap: Callable[[socket.socket], AnySocket] = lambda plain: plain,
        wire: PageWire | None = None,
    ) -> None:
        """``host``: the rows of images, by kind. ``mover``: hands over what is on PEER.

        ``wrap``, ``wire``: see ``Sender``.
        """
        self._wire = wire
        self.stats = ReceiverStats()
        self._terms, self._host, self._patience, self._wrap = terms, host, patience or Patience(), wrap
        self._news = mover.take_from(self.read)
        self._lock = threading.Lock()
        self._visits: dict[int, _Visit] = {}
        self._threads: set[threading.Thread] = set()
        self._events: list[ReceiverEvent] = []
        self._wake: Callable[[], None] = _nobody
        self._serial = 0

    def listen(self, wake: Callable[[], None] | None) -> None:
        """Call ``wake``, on any thread, when there is something to :meth:`take`."""
        self._wake = wake or _nobody

    # -- on the engine's thread ---------------------------------------------------------------------------------------

    def join(self, room: Room, weights: str, last: str, start: int) -> int:
        """Go to a room for a prompt; the number of the visit. A ``Welcomed`` follows, or a ``Parted``.

        ``weights``: what it would be computed with here; ``last``: the name of its last whole page, or nothing;
        ``start``: tokens that are there.
        """
        with self._lock:
            self._serial += 1
            visit = _Visit(self._serial, room, weights, last, start)
            self._visits[visit.serial] = visit
            self.stats.visits += 1
            name = f"rootcellar-room-{room.number}"
            thread = threading.Thread(target=self._visit, args=(visit,), name=name, daemon=True)
            self._threads.add(thread)
        thread.start()
        return visit.serial

    def promised(self, serial: int, pages: Iterable[PageName]) -> None:
        """The cache was told that these can be had of a visit."""
        with self._lock:
            if (visit := self._visits.get(serial)) is not None:
                visit.promised |= frozenset(pages)

    def read(self, moves: Sequence[Move]) -> None:
        """Ask for these pages, each move of a prefill node that promised all of it; else it fails."""
        failed: list[Event] = []
        asked: dict[Talk, list[PageName]] = {}
        with self._lock:
            for move in moves:
                pages = [(move.kind, digest) for digest in move.digests]
                visit = self._holder(pages)
                if visit is None or visit.talk is None:
                    self.stats.failed_pages += len(pages)
                    failed.append(Failed(move.id))
                    continue
                images = self._host[move.kind]
                visit.open[move.id] = opened = _Open(move.id, len(pages), len(pages))
                visit.wanted += [(opened, memoryview(images[slot - 1])) for slot in move.dst_slots.tolist()]
                asked.setdefault(visit.talk, []).extend(pages)
            for talk, wanted in asked.items():
                talk.put(Say.WANT, pages_said(wanted))
        if failed:
            self._news.tell(failed)

    def leave(self, serial: int, *, satisfied: bool) -> None:
        """Nobody waits for a visit any more: what it still brings fails, soon.

        ``satisfied``: all is well, which the prefill node is told; else it sees the end of the connection.
        """
        with self._lock:
            visit = self._visits.pop(serial, None)
            if visit is None:
                return
            visit.left, visit.satisfied = True, satisfied and not visit.open
            with self._news.changed:
                visit.counted = set(visit.open)
                self._news.under_way += len(visit.counted)
            if visit.talk is not None:
                _part(visit, visit.talk)

    def take(self) -> list[ReceiverEvent]:
        """What happened since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Let go of all prefill nodes."""
        self._wake = _nobody
        with self._lock:
            visits, threads = list(self._visits.values()), list(self._threads)
            self._visits.clear()
            for visit in visits:
                visit.left = True
                if visit.talk is not None:
                    visit.talk.connection.stop()
        until = monotonic() + _CLOSING
        for thread in threads:
            thread.join(max(0.0, until - monotonic()))
        if self._wire is not None:
            self._wire.close()

    def _holder(self, pages: Sequence[PageName]) -> _Visit | None:
        for visit in self._visits.values():
            if not visit.ended and visit.talk is not None and visit.promised.issuperset(pages):
                return visit
        return None

    # -- the thread of a visit ----------------------------------------------------------------------------------------

    def _visit(self, visit: _Visit) -> None:
        """The life of a visit."""
        talk: Talk | None = None
        room = visit.room
        why = "the prefill node ended the connection"
        try:
            route = self._look_up(room)
            hello = self._hello(visit, route)
            plain = tcp.connect(route.host, route.port, self._patience.silence)
            talk = Talk(self._wrap(plain), self._patience, "room-sends", hello)
            with self._lock:
                visit.talk, visit.lends = talk, route.lends
                if visit.left:
                    _part(visit, talk)
            while self._heard(visit, talk):
                pass
        except OSError as error:
            why = f"the prefill node at {room.host}:{room.port} is lost: {error or type(error).__name__}"
        except _TurnedAway as refused:
            why = f"the prefill node at {room.host}:{room.port} refuses room {room.number}: {refused}"
        except Exception as error:
            log.exception("a prefill node could not be understood")
            why = f"the prefill node at {room.host}:{room.port} could not be understood: {error!r}"
        finally:
            if talk is not None:
                talk.close()
            self._end(visit, why)

    def _look_up(self, room: Room) -> Route:
        route = find(room.host, room.port, self._patience.silence)
        if differs := self._terms.differences(route.terms, "the decode node", "the prefill node"):
            raise _TurnedAway(differs)
        return route

    def _hello(self, visit: _Visit, route: Route) -> bytes:
        """Who is there."""
        said = {
            "room": visit.room.number,
            "start": visit.start,
            "node": route.node,
            "weights": visit.weights,
            "last": visit.last,
            "terms": self._terms.plain(),
        }
        return json.dumps(said).encode()

    def _heard(self, visit: _Visit, talk: Talk) -> bool:
        """Take in the next frame; False: there will be none."""
        frame = talk.connection.receive()
        match frame.kind:
            case Say.PAGES:
                self._take(visit, talk, frame.says, lambda views: talk.connection.fill(frame, views))
            case Say.LENT:
                indices, nbytes, checksum, ticket = lent_read(frame.says)
                self._take(visit, talk, indices, lambda views: self._fetch(visit, ticket, nbytes, checksum, views))
            case Say.MISSING:
                self._miss(visit, indices_of(frame.says, len(visit.wanted)).tolist())
            case Say.WELCOME:
                with self._lock:
                    if not visit.left:
                        self._events.append(Welcomed(visit.serial))
                self._wake()
            case Say.REFUSED | Say.FAILED:
                raise _TurnedAway(frame.says.decode(errors="replace"))
            case Say.PULSE:
                pass
            case _:
                raise WireError(f"a prefill node does not say {frame.kind}")
        return True

    def _fetch(self, visit: _Visit, ticket: bytes, nbytes: int, checksum: int, views: Sequence[memoryview]) -> None:
        """Take what was lent into ``views``. Raises ``OSError``: it did not come, or is not what was lent."""
        if self._wire is None or nbytes != sum(view.nbytes for view in views):
            raise WireError(f"{nbytes} bytes are lent, which nobody asked for")
        with self._wire.fetch(visit.lends, ticket, nbytes, self._patience.silence) as found:
            if xxhash.xxh3_64_intdigest(found.data) != checksum:
                raise WireError("pages were damaged on the way: their checksum does not fit")
            at = 0
            for view in views:
                view.cast("B")[:] = found[at : at + view.nbytes].data
                at += view.nbytes

    def _take(self, visit: _Visit, talk: Talk, says: bytes, fill: Callable[[Sequence[memoryview]], None]) -> None:
        began = monotonic()
        with self._lock:
            indices = indices_of(says, len(visit.wanted)).tolist()
            if not visit.came.isdisjoint(indices) or len(set(indices)) < len(indices):
                raise WireError("a page comes a second time")
            visit.came.update(indices)
            places = [visit.wanted[index] for index in indices]
            # Where a move failed, its memory is somebody else's by now: what still comes of it goes nowhere.
            views = [
                view if opened.move in visit.open else memoryview(bytearray(view.nbytes)) for opened, view in places
            ]
        fill(views)
        talk.put(Say.ACK, says)
        done: list[int] = []
        with self._lock:
            self.stats.pages += len(places)
            self.stats.bytes += sum(view.nbytes for view in views)
            self.stats.seconds += monotonic() - began
            for opened, _ in places:
                opened.left -= 1
                if not opened.left and visit.open.pop(opened.move, None) is not None:
                    self.stats.moves += 1
                    done.append(opened.move)
        self._tell(visit, [Done(move) for move in done])

    def _miss(self, visit: _Visit, indices: Iterable[int]) -> None:
        """Some pages will not come: nor do the moves that they are part of."""
        with self._lock:
            gone = {visit.wanted[index][0].move for index in indices}
            failed = [visit.open.pop(move) for move in sorted(gone) if move in visit.open]
            self.stats.failed_pages += sum(opened.pages for opened in failed)
        self._tell(visit, [Failed(opened.move) for opened in failed])

    def _end(self, visit: _Visit, why: str) -> None:
        with self._lock:
            visit.ended = True
            failed = list(visit.open.values())
            visit.open.clear()
            visit.wanted.clear()
            self.stats.failed_pages += sum(opened.pages for opened in failed)
            if not visit.left:
                self.stats.lost_visits += 1
                self._events.append(Parted(visit.serial, why))
            self._threads.discard(threading.current_thread())
        self._tell(visit, [Failed(opened.move) for opened in failed])
        self._wake()

    def _tell(self, visit: _Visit, events: Sequence[Done | Failed]) -> None:
        if events:
            self._news.tell(list(events), ended=sum(event.move in visit.counted for event in events))


def _part(visit: _Visit, talk: Talk) -> None:
    """End the connection of a visit that nobody waits for: after a word, or at once."""
    if visit.satisfied:
        talk.put(Say.DONE)
        talk.end()  # the prefill node, which hears that, closes it
    else:
        talk.connection.stop()


class _TurnedAway(Exception):
    """The prefill node said that there will be nothing, and why."""


def _nobody() -> None:
    """Nobody listens."""
