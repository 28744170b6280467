"""A prefill node's side: rooms in which decode nodes are met, and pages sent to them as they are offered.

The engine's thread says which rooms there are and offers manifests; what the device has of pages that are due is read
there too, before the next step may overwrite anything. Each connection has a thread that hears it and one that sends.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import xxhash

from rootcellar.cache import Manifest
from rootcellar.errors import RequestError
from rootcellar.pools.copying import Copier
from rootcellar.transfer.bootstrap import Bootstrap, Route
from rootcellar.transfer.ledger import Ledger
from rootcellar.transfer.talk import Patience, Say, Talk, indices_of, lent_said, pages_read
from rootcellar.transfer.terms import Terms
from rootcellar.transfer.wires import tcp
from rootcellar.transfer.wires.tcp import AnySocket, WireError
from rootcellar.transfer.wires.wire import Bytes, PageWire

log = logging.getLogger(__name__)

TOGETHER = 64
"""Pages of one frame."""
MOST_QUEUED = 256 * 2**20
"""Bytes that were read from the device and are not sent yet, at most, or one frame's."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A decode node came into a room; it can resume at ``start`` (tokens) by itself."""

    room: int
    start: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """What these manifests of a room offered need not be held any longer."""

    room: int
    manifests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Satisfied:
    """The decode node has all that it needs."""

    room: int


@dataclass(frozen=True, slots=True)
class Left:
    """There is no decode node in the room any more."""

    room: int
    why: str


@dataclass(frozen=True, slots=True)
class SentAway:
    """A decode node came that does not fit; the room waits for another."""

    room: int
    why: str


SenderEvent = Joined | Arrived | Satisfied | Left | SentAway


@dataclass(slots=True)
class _Room:
    number: int
    weights: str
    last: str
    ledger: Ledger = field(default_factory=Ledger)
    talk: Talk | None = None
    done: bool = False


@dataclass(slots=True, eq=False)
class _Caller:
    """A decode node that named a room. ``room``: the one it is in; ``refused``: it was told so, and should go;
    ``satisfied``: it said that it needs nothing, and went, before the room was there.

    ``until``: when what it waits for should have been, by the clock: its room, or that it goes.
    """

    talk: Talk
    number: int
    start: int
    node: str
    weights: str
    last: str
    terms: Terms
    until: float
    room: _Room | None = None
    refused: bool = False
    satisfied: bool = False


@dataclass(slots=True)
class SenderStats:
    """What was sent; ``seconds``: in which a frame of pages was being sent."""

    rooms: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    missing_pages: int = 0
    failed_rooms: int = 0


class Sender:
    """Gives pages to decode nodes."""

    def __init__(
        self,
        terms: Terms,
        copiers: Mapping[str, Copier],
        host: str,
        port: int,
        patience: Patience | None = None,
        wrap: Callable[[socket.socket], AnySocket] = lambda plain: plain,
        wire: PageWire | None = None,
    ) -> None:
        """Listen on ``host``: ``port`` is the bootstrap service's. Raises ``OSError``.

        ``copiers``: of each kind's pool. ``wrap``: what stands around each connection's socket, for tests. ``wire``: by
        which pages go, if not after what is said of them.
        """
        self.node = uuid.uuid4().hex
        self.stats = SenderStats()
        self._terms, self._copiers, self._patience, self._wrap = terms, copiers, patience or Patience(), wrap
        self._lock = threading.Lock()
        self._rooms: dict[int, _Room] = {}
        self._waiting: dict[int, list[_Caller]] = {}
        """Decode nodes whose room is not there yet, by its number, in the order in which they came."""
        self._events: list[SenderEvent] = []
        self._wake: Callable[[], None] = _nobody
        self._queued = 0
        self._wire = wire
        self._lent: dict[Talk, dict[bytes, bytes]] = {}
        """Tickets for what each decode node has not said that it has, by the pages."""
        self._talks: set[Talk] = set()
        self._closed = False
        self._listener = tcp.listen(host)
        try:
            self._bootstrap = Bootstrap(host, port)
        except BaseException:
            self._listener.close()
            raise
        lends = "" if wire is None else wire.address
        self._bootstrap.register(Route(host, self._listener.getsockname()[1], self.node, terms, lends).plain())
        self._thread = threading.Thread(target=self._accept, name="rootcellar-sender", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Of the bootstrap service."""
        return self._bootstrap.port

    @property
    def queued(self) -> int:
        """Bytes that were read from the device and are not sent yet."""
        return self._queued

    def listen(self, wake: Callable[[], None] | None) -> None:
        """Call ``wake``, on any thread, when there is something to :meth:`take`, or to :meth:`pump`."""
        self._wake = wake or _nobody

    # -- on the engine's thread ---------------------------------------------------------------------------------------

    def expect(self, number: int, weights: str, last: str) -> None:
        """There is a request in a room; a decode node may come. ``RequestError``: the room is taken.

        ``weights``: what it is computed with; ``last``: the name of its last whole page, or nothing.
        """
        with self._lock:
            if number in self._rooms:
                raise RequestError(f"bootstrap_room {number} is in use: give each request a room of its own")
            self._rooms[number] = room = _Room(number, weights, last)
            self.stats.rooms += 1
            for caller in self._waiting.pop(number, ()):
                self._receive(room, caller)

    def offer(self, number: int, manifest: Manifest) -> None:
        """These pages may be fetched; they stay where they are until an ``Arrived``, or until :meth:`end`."""
        with self._lock:
            self._rooms[number].ledger.offer(manifest)

    def computed(self, number: int) -> None:
        """Nothing more will be offered in a room."""
        with self._lock:
            self._rooms[number].ledger.end()

    def end(self, number: int, why: str | None = None) -> list[int]:
        """Nobody is in the room any more; ``why``: the decode node is told. Returns the manifests that were held."""
        with self._lock:
            room = self._rooms.pop(number, None)
            if room is None:
                return []
            talk, told, room.done = room.talk, room.done, True
            if why is not None and not told:
                self.stats.failed_rooms += 1
            held = room.ledger.manifests
            for event in self._events:
                if isinstance(event, Arrived) and event.room == number:
                    held += event.manifests
            self._events = [event for event in self._events if event.room != number]
        if talk is not None and why is not None and not told:
            talk.put(Say.FAILED, why.encode())
        return held

    def take(self) -> list[SenderEvent]:
        """What happened since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def pump(self) -> None:
        """Begin to read from the device what is due, as far as there is room for it, and say what will not come."""
        while (work := self._next()) is not None:
            talk, kind, found = work
            self._read(talk, kind, found)

    def _next(self) -> tuple[Talk, str, list[tuple[int, int]]] | None:
        """Pages of one kind to read for one room, index and slot."""
        with self._lock:
            for room in self._rooms.values():
                if room.talk is None or room.done:
                    continue
                if missing := room.ledger.take_missing():
                    self.stats.missing_pages += len(missing)
                    room.talk.put(Say.MISSING, np.asarray(missing, "<u4").tobytes())
                self._let_go(room)
                if self._queued >= MOST_QUEUED:
                    continue
                kind, found = room.ledger.take_due(TOGETHER)
                if found:
                    self._queued += len(found) * self._copiers[kind].image.nbytes
                    return room.talk, kind, found
        return None

    def _read(self, talk: Talk, kind: str, found: list[tuple[int, int]]) -> None:
        copier = self._copiers[kind]
        images = np.empty((len(found), copier.image.nbytes), np.uint8)
        slots = np.array([slot for _, slot in found], np.int32)
        says = np.array([index for index, _ in found], "<u4").tobytes()
        wait = copier.read(slots, images, np.arange(len(found)))

        def send() -> None:
            try:
                wait()
                began = monotonic()
                if self._wire is None:
                    talk.connection.send(Say.PAGES, says, [images.data])
                else:
                    self._lend(self._wire, talk, says, images.reshape(-1))
                with self._lock:
                    self.stats.pages += len(found)
                    self.stats.bytes += images.nbytes
                    self.stats.seconds += monotonic() - began
            finally:
                free()

        def free() -> None:
            with self._lock:
                self._queued -= images.nbytes
            self._wake()

        talk.do(send, free)

    def _lend(self, wire: PageWire, talk: Talk, says: bytes, images: Bytes) -> None:
        """Say that these images can be fetched, once there is room for them among those that others are to fetch."""
        while (ticket := wire.lend(images, self._patience.pulse)) is None:
            talk.connection.send(Say.PULSE)
        with self._lock:
            self._lent.setdefault(talk, {})[says] = ticket
        talk.connection.send(Say.LENT, lent_said(says, images.nbytes, xxhash.xxh3_64_intdigest(images.data), ticket))

    def _withdraw(self, talk: Talk) -> None:
        """A decode node fetches nothing any more."""
        with self._lock:
            tickets = self._lent.pop(talk, {}).values()
        for ticket in tickets:
            if self._wire is not None:
                self._wire.withdraw(ticket)

    # -- any thread ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of all decode nodes, and listen no more."""
        with self._lock:
            self._closed = True
            talks = list(self._talks)
        self._wake = _nobody
        self._bootstrap.close()
        tcp.end_listening(self._listener)
        self._thread.join()
        for talk in talks:
            talk.close()
            self._withdraw(talk)
        if self._wire is not None:
            self._wire.close()

    def _accept(self) -> None:
        while True:
            plain = tcp.accept(self._listener, self._patience.silence)
            if plain is None:
                return
            threading.Thread(target=self._hear, args=(plain,), name="rootcellar-sender-hears", daemon=True).start()

    def _hear(self, plain: socket.socket) -> None:
        """The life of one connection."""
        talk = Talk(self._wrap(plain), self._patience, "sender-sends")
        with self._lock:
            self._talks.add(talk)
            closed = self._closed
        caller: _Caller | None = None
        why = "the connection to the decode node ended"
        try:
            if not closed:
                caller = self._greeted(talk)
                while self._heard(caller):
                    pass
        except OSError as error:
            why = f"the decode node is gone: {error or type(error).__name__}"
        except Exception as error:  # what came made no sense
            log.exception("a decode node could not be understood")
            why = f"the decode node could not be understood: {error!r}"
        finally:
            talk.close()
            self._withdraw(talk)
            with self._lock:
                self._talks.discard(talk)
                if caller is not None:
                    self._goes(caller, why)

    def _greeted(self, talk: Talk) -> _Caller:
        """Who a decode node is; it is in its room now, or waits for it, or was refused."""
        frame = talk.connection.receive()
        if frame.kind != Say.HELLO:
            raise WireError("a decode node begins with what it is, and this one does not")
        until = monotonic() + self._patience.meeting
        try:
            said: dict[str, Any] = json.loads(frame.says)
            number, start = int(said["room"]), int(said["start"])
            node, weights, last = str(said["node"]), str(said["weights"]), str(said["last"])
            if start < 0:
                raise ValueError(f"start={start}")
            caller = _Caller(talk, number, start, node, weights, last, Terms.read(said["terms"]), until)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise WireError(f"a decode node does not say what it is: {error!r}") from None
        with self._lock:
            if (room := self._rooms.get(number)) is not None:
                self._receive(room, caller)
            else:
                self._forget_late(monotonic())
                self._waiting.setdefault(number, []).append(caller)
        return caller

    def _forget_late(self, now: float) -> None:
        """Those who went, and whose room never came: nobody hears them any more, who would see to it."""
        late = [each for callers in self._waiting.values() for each in callers if each.satisfied and each.until <= now]
        for caller in late:
            caller.satisfied = False
            self._goes(caller, "")

    def _receive(self, room: _Room, caller: _Caller) -> None:
        """Let a decode node into its room, or tell it why not: that is between the two, and the room stays open."""
        if room.talk is not None or room.done:
            self._refuse(caller, f"bootstrap_room {room.number} is in use: another decode node is in it")
        elif why := self._unfit(room, caller.node, caller.terms, caller.weights, caller.last):
            self._refuse(caller, why)
            self._tell(SentAway(room.number, why))
        else:
            room.talk, caller.room = caller.talk, room
            caller.talk.put(Say.WELCOME)
            self._tell(Joined(room.number, caller.start))
            if caller.satisfied:
                room.done = True
                self._tell(Satisfied(room.number))

    def _refuse(self, caller: _Caller, why: str) -> None:
        caller.refused, caller.until = True, monotonic() + self._patience.silence
        caller.talk.put(Say.REFUSED, why.encode())

    def _goes(self, caller: _Caller, why: str) -> None:
        """A decode node is here no longer."""
        waiting = self._waiting.get(caller.number, [])
        if caller in waiting and not caller.satisfied:
            waiting.remove(caller)
            if not waiting:
                del self._waiting[caller.number]
        if caller.room is not None and not caller.room.done:
            caller.room.done = True
            self._tell(Left(caller.room.number, why))

    def _unfit(self, room: _Room, node: str, terms: Terms, weights: str, last: str) -> str:
        """Why a decode node cannot have what is in a room; empty: it can."""
        if node != self.node:
            return "the prefill node was started again since it was asked for"
        if differs := self._terms.differences(terms, "the prefill node", "the decode node"):
            return differs
        if weights != room.weights:
            return f"weights are {room.weights!r} on the prefill node and {weights!r} on the decode node"
        if last != room.last:
            return (
                f"the prompts in room {room.number}, or whose they are (API key, cache_salt, extra_key), are not the "
                f"same: their last page is {room.last[:16] or None} on the prefill node and {last[:16] or None} on the "
                "decode node"
            )
        return ""

    def _heard(self, caller: _Caller) -> bool:
        """Take in the next frame; False: there will be none."""
        frame = caller.talk.connection.receive()
        if frame.nbytes:
            raise WireError("a decode node sends no pages")
        with self._lock:
            if frame.kind == Say.PULSE:
                return caller.room is not None or self._waits(caller)
            room = caller.room
            if room is None:
                if frame.kind != Say.DONE:
                    raise WireError(f"a decode node that is in no room does not say {frame.kind}")
                caller.satisfied = True
                return False
            if frame.kind == Say.WANT:
                pages = pages_read(frame.says)
                if unknown := {kind for kind, _ in pages} - set(self._copiers):
                    raise WireError(f"there is no kind {sorted(unknown)[0]!r}")
                room.ledger.want(pages)
            elif frame.kind == Say.ACK:
                room.ledger.arrived(indices_of(frame.says, len(room.ledger.wanted)).tolist())
                ticket = self._lent.get(caller.talk, {}).pop(frame.says, None)
                if ticket is not None and self._wire is not None:
                    self._wire.withdraw(ticket)
                self._let_go(room)
            elif frame.kind == Say.DONE:
                if not room.done:
                    room.done = True
                    self._tell(Satisfied(room.number))
                return False
            else:
                raise WireError(f"a decode node does not say {frame.kind}")
        if frame.kind == Say.WANT:
            self._wake()
        return True

    def _waits(self, caller: _Caller) -> bool:
        """Whether a decode node that is in no room may go on waiting for it, or for having read that it was refused."""
        if monotonic() < caller.until:
            return True
        if caller.refused:
            return False
        self._goes(caller, "")
        why = f"no request came to the prefill node for room {caller.number} within {self._patience.meeting:g} s"
        self._refuse(caller, why)
        return True

    def _let_go(self, room: _Room) -> None:
        if done := room.ledger.let_go():
            self._tell(Arrived(room.number, tuple(done)))

    def _tell(self, event: SenderEvent) -> None:
        self._events.append(event)
        self._wake()


def _nobody() -> None:
    """Nobody listens."""
