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

from rootcellar.cache import Manifest
from rootcellar.errors import RequestError
from rootcellar.pools.copying import Copier
from rootcellar.transfer.bootstrap import Bootstrap, Route
from rootcellar.transfer.ledger import Ledger
from rootcellar.transfer.talk import Patience, Say, Talk, indices_of, pages_read
from rootcellar.transfer.terms import Terms
from rootcellar.transfer.wires import tcp
from rootcellar.transfer.wires.tcp import AnySocket, WireError

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
    """There is no decode node in the room any more, or the one that came does not fit."""

    room: int
    why: str


SenderEvent = Joined | Arrived | Satisfied | Left


@dataclass(slots=True)
class _Room:
    number: int
    weights: str
    last: str
    ledger: Ledger = field(default_factory=Ledger)
    talk: Talk | None = None
    done: bool = False


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
    ) -> None:
        """Listen on ``host``: ``port`` is the bootstrap service's. Raises ``OSError``.

        ``copiers``: of each kind's pool. ``wrap``: what stands around each connection's socket, for tests.
        """
        self.node = uuid.uuid4().hex
        self.stats = SenderStats()
        self._terms, self._copiers, self._patience, self._wrap = terms, copiers, patience or Patience(), wrap
        self._changed = threading.Condition()
        self._rooms: dict[int, _Room] = {}
        self._events: list[SenderEvent] = []
        self._wake: Callable[[], None] = _nobody
        self._queued = 0
        self._talks: set[Talk] = set()
        self._closed = False
        self._listener = tcp.listen(host)
        try:
            self._bootstrap = Bootstrap(host, port)
        except BaseException:
            self._listener.close()
            raise
        self._bootstrap.register(Route(host, self._listener.getsockname()[1], self.node, terms).plain())
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
        with self._changed:
            if number in self._rooms:
                raise RequestError(f"bootstrap_room {number} is in use: give each request a room of its own")
            self._rooms[number] = _Room(number, weights, last)
            self.stats.rooms += 1
            self._changed.notify_all()

    def offer(self, number: int, manifest: Manifest) -> None:
        """These pages may be fetched; they stay where they are until an ``Arrived``, or until :meth:`end`."""
        with self._changed:
            self._rooms[number].ledger.offer(manifest)

    def computed(self, number: int) -> None:
        """Nothing more will be offered in a room."""
        with self._changed:
            self._rooms[number].ledger.end()

    def end(self, number: int, why: str | None = None) -> list[int]:
        """Nobody is in the room any more; ``why``: the decode node is told. Returns the manifests that were held."""
        with self._changed:
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
        with self._changed:
            events, self._events = self._events, []
        return events

    def pump(self) -> None:
        """Begin to read from the device what is due, as far as there is room for it, and say what will not come."""
        while (work := self._next()) is not None:
            talk, kind, found = work
            self._read(talk, kind, found)

    def _next(self) -> tuple[Talk, str, list[tuple[int, int]]] | None:
        """Pages of one kind to read for one room, index and slot."""
        with self._changed:
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
                talk.connection.send(Say.PAGES, says, [images.data])
                with self._changed:
                    self.stats.pages += len(found)
                    self.stats.bytes += images.nbytes
                    self.stats.seconds += monotonic() - began
            finally:
                free()

        def free() -> None:
            with self._changed:
                self._queued -= images.nbytes
            self._wake()

        talk.do(send, free)

    # -- any thread ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of all decode nodes, and listen no more."""
        with self._changed:
            self._closed = True
            talks = list(self._talks)
            self._changed.notify_all()
        self._wake = _nobody
        self._bootstrap.close()
        tcp.end_listening(self._listener)
        self._thread.join()
        for talk in talks:
            talk.close()

    def _accept(self) -> None:
        while True:
            plain = tcp.accept(self._listener, self._patience.silence)
            if plain is None:
                return
            threading.Thread(target=self._hear, args=(plain,), name="rootcellar-sender-hears", daemon=True).start()

    def _hear(self, plain: socket.socket) -> None:
        """The life of one connection."""
        talk = Talk(self._wrap(plain), self._patience, "sender-sends")
        with self._changed:
            self._talks.add(talk)
            closed = self._closed
        room: _Room | None = None
        why = "the connection to the decode node ended"
        try:
            if not closed:
                room = self._meet(talk)
            while room is not None and self._heard(talk, room):
                pass
        except OSError as error:
            why = f"the decode node is gone: {error or type(error).__name__}"
        except Exception as error:  # what came made no sense
            log.exception("a decode node could not be understood")
            why = f"the decode node could not be understood: {error!r}"
        finally:
            talk.close()
            with self._changed:
                self._talks.discard(talk)
                if room is not None and not room.done:
                    room.done = True
                    self._tell(Left(room.number, why))

    def _meet(self, talk: Talk) -> _Room | None:
        """Wait until the room that a decode node names is there. None: it was refused."""
        frame = talk.connection.receive()
        if frame.kind != Say.HELLO:
            raise WireError("a decode node begins with what it is, and this one does not")
        try:
            said: dict[str, Any] = json.loads(frame.says)
            number, start = int(said["room"]), int(said["start"])
            node, weights, last = str(said["node"]), str(said["weights"]), str(said["last"])
            terms = Terms.read(said["terms"])
            if start < 0:
                raise ValueError(f"start={start}")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise WireError(f"a decode node does not say what it is: {error!r}") from None
        with self._changed:
            there = self._changed.wait_for(lambda: self._closed or number in self._rooms, self._patience.meeting)
            room = self._rooms.get(number)
            if self._closed or not there or room is None:
                why = f"no request came to the prefill node for room {number} within {self._patience.meeting:g} s"
                room = None
            elif room.talk is not None:
                why = f"bootstrap_room {number} is in use: another decode node is in it"
                room = None
            elif why := self._unfit(room, node, terms, weights, last):
                room.done = True
                self._tell(Left(number, why))
                room = None
            else:
                room.talk = talk
                talk.put(Say.WELCOME)
                self._tell(Joined(number, start))
        if room is None:
            talk.put(Say.REFUSED, why.encode())
            while talk.connection.receive().kind == Say.PULSE:  # until it has read that and goes
                pass
        return room

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

    def _heard(self, talk: Talk, room: _Room) -> bool:
        """Take in the next frame; False: there will be none."""
        frame = talk.connection.receive()
        if frame.nbytes:
            raise WireError("a decode node sends no pages")
        with self._changed:
            if frame.kind == Say.WANT:
                pages = pages_read(frame.says)
                if unknown := {kind for kind, _ in pages} - set(self._copiers):
                    raise WireError(f"there is no kind {sorted(unknown)[0]!r}")
                room.ledger.want(pages)
            elif frame.kind == Say.ACK:
                room.ledger.arrived(indices_of(frame.says, len(room.ledger.wanted)).tolist())
                self._let_go(room)
            elif frame.kind == Say.DONE:
                if not room.done:
                    room.done = True
                    self._tell(Satisfied(room.number))
                return False
            elif frame.kind != Say.PULSE:
                raise WireError(f"a decode node does not say {frame.kind}")
        if frame.kind == Say.WANT:
            self._wake()
        return True

    def _let_go(self, room: _Room) -> None:
        if done := room.ledger.let_go():
            self._tell(Arrived(room.number, tuple(done)))

    def _tell(self, event: SenderEvent) -> None:
        self._events.append(event)
        self._wake()


def _nobody() -> None:
    """Nobody listens."""
