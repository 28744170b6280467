"""What ranks say to each other: a star of TCP connections around rank 0, whose frames are few and small.

Rank 0 *leads*: it sends what is to be done (``lead``), in order. In an *agreement* every other rank says what it has
(``say``), rank 0 hears all of them (``gather``) and tells what follows (``tell``, ``hear``). A rank that is silent for
``timeout`` seconds, or whose connection ends, is lost, and with it the engine: whoever waits here gets an
``EngineError``, and ``lost`` is called once.

Frames are pickles of the engine's own values; a pickle that names anything else is refused, and so is whoever does not
know the secret that the ranks drew when they met (``meeting.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import pickle
import queue
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from rootcellar.errors import EngineError

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<IB")


class FrameKind(IntEnum):
    """What a frame is: a sign of life, the reason of an end, or a call of ``Exchange`` by its name."""

    BEAT, END, LEAD, SAY, TELL, NEWS = range(6)


_BEATS = 5
"""Signs of life within a timeout."""
_GREETING = 5.0
"""Seconds for saying who one is."""
_FAREWELL = 0.5
"""Seconds for saying why a connection ends."""
_LONGEST = 2**30
_ALLOWED = {
    "builtins": {"frozenset", "set", "bytearray", "complex"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
}
"""Beside the values of ``rootcellar``, what their pickles may name."""


class Exchange(Protocol):
    """What one rank says to the others and hears from them. ``rank`` of ``ranks``; rank 0 leads."""

    @property
    def rank(self) -> int:
        """This one."""
        ...

    @property
    def ranks(self) -> int:
        """How many there are."""
        ...

    def listen(self, *, led: Callable[[Any], None], news: Callable[[], None], lost: Callable[[str], None]) -> None:
        """From now on call ``led`` with what rank 0 leads, in order; ``news`` when a rank has news for rank 0.

        ``lost``, once, with the reason, when there is no going on. All of them on other threads.
        """
        ...

    def lead(self, what: object) -> None:
        """Rank 0: let all others do this, after all that was led before. ``EngineError``: it is over."""
        ...

    def gather(self) -> list[Any]:
        """Rank 0: what each other rank says next, by rank; waits for it. ``EngineError``: one is lost."""
        ...

    def tell(self, what: object) -> None:
        """Rank 0: what follows from what was gathered."""
        ...

    def say(self, what: object) -> None:
        """Other ranks: the part in an agreement."""
        ...

    def hear(self) -> Any:
        """Other ranks: what rank 0 tells next; waits for it. ``EngineError``: it is lost."""
        ...

    def news(self) -> None:
        """Other ranks: there is something to agree on."""
        ...

    def ended(self, within: float) -> str:
        """Why it is over, or is so within so many seconds; empty: it goes on."""
        ...

    @property
    def in_order(self) -> bool:
        """Whether it is over because a rank was told to end."""
        ...

    def close(self, why: str, *, in_order: bool = False) -> None:
        """Leave the others, which ends their engines, with this reason. ``in_order``: since it was told to."""
        ...


@dataclass(frozen=True)
class Farewell:
    """Why a rank ends; ``in_order``: it was told to."""

    why: str
    in_order: bool = False


class Link:
    """One connection: sends from any thread; a thread of its own receives."""

    def __init__(self, sock: socket.socket, timeout: float, peer: int) -> None:
        """To rank ``peer``."""
        self.peer = peer
        self._sock = sock
        self._sending = threading.Lock()
        sock.settimeout(timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def greet(self, secret: bytes) -> None:
        """Say, first of all, who one is."""
        self._sock.sendall(secret)

    def greeted(self, count: int) -> bytes:
        """So many bytes that the other end says first of all; it has a few seconds for that."""
        before = self._sock.gettimeout()
        self._sock.settimeout(_GREETING)
        found = self._read(count)
        self._sock.settimeout(before)
        return found

    def expect_within(self, timeout: float) -> None:
        """Whoever says nothing for so many seconds is lost."""
        self._sock.settimeout(timeout)

    def send(self, kind: int, what: object = None) -> None:
        """Send a frame. ``OSError`` when that is not possible within the timeout."""
        frame = _frame(kind, what)
        with self._sending:
            self._sock.sendall(frame)

    def receive(self) -> tuple[int, Any]:
        """The next frame. ``OSError`` when none comes within the timeout, ``EOFError`` after the last."""
        length, kind = _HEAD.unpack(self._read(_HEAD.size))
        if length > _LONGEST:
            raise OSError(f"a frame of {length} bytes")
        return kind, _load(self._read(length)) if length else None

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._sock.recv(min(count - len(parts), 2**20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def close(self, why: Farewell) -> None:
        """End it, for whoever sends or receives too, and say why if the other end still listens."""
        with contextlib.suppress(OSError):
            if self._sending.acquire(timeout=_FAREWELL):
                try:
                    self._sock.settimeout(_FAREWELL)
                    self._sock.sendall(_frame(FrameKind.END, why))
                finally:
                    self._sending.release()
        with contextlib.suppress(OSError):  # it had ended
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class Star:
    """The exchange of one engine over connections: rank 0 has one to each other rank, and they have one to it."""

    def __init__(self, rank: int, ranks: int, connections: Sequence[Link], timeout: float) -> None:
        """``timeout``: seconds without a word after which a rank is lost. Threads begin to listen at once."""
        self._rank, self._ranks, self._timeout = rank, ranks, timeout
        self._connections = list(connections)
        self._said: dict[int, queue.SimpleQueue[Any]] = {each.peer: queue.SimpleQueue() for each in connections}
        self._led: Callable[[Any], None] | None = None
        self._news: Callable[[], None] = _nothing
        self._lost: Callable[[str], None] | None = None
        self._early: list[Any] = []
        """What was led before anybody listened."""
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self.why = ""
        self._in_order = False
        for each in connections:
            threading.Thread(target=self._receive, args=(each,), name="rootcellar-ranks", daemon=True).start()
        threading.Thread(target=self._beat, name="rootcellar-beat", daemon=True).start()

    @property
    def rank(self) -> int:
        """See ``Exchange``."""
        return self._rank

    @property
    def ranks(self) -> int:
        """See ``Exchange``."""
        return self._ranks

    def listen(self, *, led: Callable[[Any], None], news: Callable[[], None], lost: Callable[[str], None]) -> None:
        """See ``Exchange``."""
        with self._guard:
            for what in self._early:
                led(what)
            self._led, self._news, self._lost = led, news, lost
            ended = self._ended.is_set()
        if ended:
            lost(self.why)

    def lead(self, what: object) -> None:
        """See ``Exchange``."""
        self._send_all(FrameKind.LEAD, what)
        if self._ended.is_set():
            raise EngineError(self.why)

    def gather(self) -> list[Any]:
        """See ``Exchange``."""
        return [self._next(each.peer) for each in self._connections]

    def tell(self, what: object) -> None:
        """See ``Exchange``."""
        self._send_all(FrameKind.TELL, what)

    def say(self, what: object) -> None:
        """See ``Exchange``."""
        self._send_all(FrameKind.SAY, what)

    def hear(self) -> Any:
        """See ``Exchange``."""
        return self._next(0)

    def news(self) -> None:
        """See ``Exchange``."""
        if not self._ended.is_set():
            self._send_all(FrameKind.NEWS)

    def ended(self, within: float) -> str:
        """See ``Exchange``."""
        self._ended.wait(within)
        return self.why

    @property
    def in_order(self) -> bool:
        """See ``Exchange``."""
        return self._in_order

    def close(self, why: str, *, in_order: bool = False) -> None:
        """See ``Exchange``."""
        self._end(Farewell(why, in_order), tell=False)

    def _send_all(self, kind: int, what: object = None) -> None:
        for each in self._connections:
            try:
                each.send(kind, what)
            except OSError as error:
                self._end(Farewell(f"rank {each.peer} of {self._ranks} is lost: {_words(error)}"))

    def _next(self, peer: int) -> Any:
        """What a rank says next; its messages are put in one-element tuples, and None is the end."""
        found = None if self._ended.is_set() else self._said[peer].get()
        if found is None:
            raise EngineError(self.why)
        return found[0]

    def _beat(self) -> None:
        while not self._ended.wait(self._timeout / _BEATS):
            self._send_all(FrameKind.BEAT)

    def _receive(self, connection: Link) -> None:
        peer, end = connection.peer, None
        name = f"rank {peer} of {self._ranks}"
        try:
            while end is None:
                kind, what = connection.receive()
                match kind:
                    case FrameKind.END:
                        end = Farewell(f"{name} ended: {what.why}", what.in_order)
                    case FrameKind.LEAD:
                        self._take(what)
                    case FrameKind.SAY | FrameKind.TELL:
                        self._said[peer].put((what,))
                    case FrameKind.NEWS:
                        self._news()
        except TimeoutError:
            end = Farewell(f"{name} is lost: nothing was heard of it for {self._timeout:g} s (dist_timeout)")
        except (OSError, EOFError) as error:
            end = Farewell(f"{name} is lost: {_words(error)}")
        except Exception as error:  # what it says cannot be understood
            log.exception("what rank %d says cannot be read", peer)
            end = Farewell(f"what {name} says cannot be read: {error}")
        self._end(end)

    def _take(self, what: object) -> None:
        with self._guard:
            if self._led is None:
                self._early.append(what)
            else:
                self._led(what)

    def _end(self, end: Farewell, *, tell: bool = True) -> None:
        """It ends, once; the others are told why, and here whoever waits, and (``tell``) whoever listens."""
        with self._guard:
            if self._ended.is_set():
                return
            self.why, self._in_order = end.why, end.in_order
            self._ended.set()
            lost = self._lost
        for each in self._connections:
            each.close(end)
        for said in self._said.values():
            said.put(None)
        if tell and lost is not None:
            lost(end.why)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what ranks say to each other."""
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module.startswith("rootcellar.") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that ranks say")


def _frame(kind: int, what: object) -> bytes:
    body = b"" if what is None else pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
    return _HEAD.pack(len(body), kind) + body


def _load(body: bytes) -> Any:
    return _Reader(io.BytesIO(body)).load()


def _words(error: BaseException) -> str:
    return "its connection ended" if isinstance(error, EOFError | ConnectionError) else str(error)


def _nothing() -> None:
    """Nobody listens."""
