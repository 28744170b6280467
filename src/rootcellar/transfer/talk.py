"""What two nodes say to each other in a room, and the thread that says it."""

from __future__ import annotations

import logging
import queue
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from rootcellar.tiers.store import Block
from rootcellar.transfer.wires.tcp import AnySocket, Framed, WireError

log = logging.getLogger(__name__)

PageName = tuple[str, bytes]
"""A page's kind, and the digest that names it."""
Indices = NDArray[np.uint32]
"""Pages by their place among all that were asked for in a room."""
DIGEST = 32


class Say(IntEnum):
    """Kinds of frames; who says them."""

    HELLO = 1
    """Decode: which room, and what it is (JSON)."""
    WELCOME = 2
    """Prefill: the room's request is there and fits."""
    REFUSED = 3
    """Prefill: it does not; why."""
    WANT = 4
    """Decode: pages, from now on by their place among all that it wanted in the room."""
    PAGES = 5
    """Prefill: some of them, one after the other."""
    MISSING = 6
    """Prefill: some that will not come."""
    ACK = 7
    """Decode: some that have come."""
    DONE = 8
    """Decode: it needs nothing more."""
    FAILED = 9
    """Prefill: nothing more will come; why."""
    PULSE = 10
    """Both: it is alive."""
    LENT = 11
    """Prefill: some pages, one after the other, to be fetched by another wire (``lent_said``)."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. ``silence``: without a word after which the other node is dead; it says something far more often.

    ``meeting``: that one of the two waits in a room for the other.
    """

    silence: float = 10.0
    meeting: float = 300.0

    @property
    def pulse(self) -> float:
        """After which something is said by who has nothing to say."""
        return self.silence / 4


def _nothing() -> None:
    """Nobody is told."""


class Talk:
    """A connection, and the thread that sends what is put here, in order; a pulse when there is nothing."""

    def __init__(self, plain: AnySocket, patience: Patience, name: str, hello: bytes | None = None) -> None:
        """``hello``: what is said before anything else, also where this process stood still for a pulse."""
        self.connection = Framed(plain)
        self._pulse = patience.pulse
        self._work: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._over = threading.Lock()
        """Guards whether the thread takes nothing more."""
        self._ended = False
        if hello is not None:
            self.put(Say.HELLO, hello)
        self._thread = threading.Thread(target=self._run, name=f"rootcellar-{name}", daemon=True)
        self._thread.start()

    def put(self, kind: Say, says: bytes = b"", blocks: Sequence[Block] = ()) -> None:
        """Send a frame when all before it are sent."""
        self.do(lambda: self.connection.send(kind, says, blocks))

    def do(self, work: Callable[[], None], dropped: Callable[[], None] = _nothing) -> None:
        """Do ``work`` when all before it is done: it sends frames by itself. ``dropped``: called if it never is."""
        with self._over:
            if not self._ended:
                self._work.put((work, dropped))
                return
        dropped()

    def end(self) -> None:
        """Send what was put here, and then nothing more."""
        self._work.put(None)

    def close(self) -> None:
        """End it now; whoever receives gets an error. Waits for the thread, which nothing holds any more."""
        self.connection.stop()
        self.end()
        self._thread.join()
        self.connection.close()

    def _run(self) -> None:
        try:
            while True:
                try:
                    work = self._work.get(timeout=self._pulse)
                except queue.Empty:
                    self.connection.send(Say.PULSE)
                    continue
                if work is None:
                    return
                work[0]()
        except Exception as error:  # who receives is told by the end of the connection
            if not isinstance(error, OSError):
                log.warning("what was to be sent to a peer could not be made: %r", error)
            self.connection.stop()
        finally:
            with self._over:
                self._ended = True
            while not self._work.empty():  # what waits is not sent, and its memory let go of
                if (work := self._work.get()) is not None:
                    work[1]()


def indices_of(says: bytes, most: int) -> Indices:
    """What a frame says, as indices below ``most``. Raises ``WireError``."""
    if len(says) % 4:
        raise WireError("a frame should say which pages it is about, and does not")
    indices = np.frombuffer(says, "<u4")
    if len(indices) and int(indices.max()) >= most:
        raise WireError(f"a frame is about page {int(indices.max())} of {most} that were asked for")
    return indices


_LENT = struct.Struct("<QQI")


def lent_said(indices: bytes, nbytes: int, checksum: int, ticket: bytes) -> bytes:
    """Pages that are lent, as ``LENT`` says them: how many bytes, the sum of those (XXH3), the ticket, and which."""
    return _LENT.pack(nbytes, checksum, len(ticket)) + ticket + indices


def lent_read(says: bytes) -> tuple[bytes, int, int, bytes]:
    """The inverse of :func:`lent_said`. Raises ``WireError``."""
    if len(says) < _LENT.size:
        raise WireError("a frame should say what is lent, and does not")
    nbytes, checksum, length = _LENT.unpack_from(says)
    begin = _LENT.size + length
    if begin > len(says):
        raise WireError("a frame that says what is lent ends too soon")
    return says[begin:], nbytes, checksum, says[_LENT.size : begin]


def pages_said(pages: Sequence[PageName]) -> bytes:
    """Pages, as ``WANT`` says them: runs of a kind, then digests."""
    runs: list[tuple[bytes, int]] = []
    for kind, _ in pages:
        name = kind.encode()
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    head = [len(runs).to_bytes(4, "little")]
    head += [len(name).to_bytes(4, "little") + name + count.to_bytes(4, "little") for name, count in runs]
    return b"".join([*head, *(digest for _, digest in pages)])


def pages_read(says: bytes) -> list[PageName]:
    """The inverse of :func:`pages_said`. Raises ``WireError``."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        if at > len(says):
            raise WireError("a frame that asks for pages ends too soon")
        return says[at - count : at]

    runs: list[tuple[str, int]] = []
    for _ in range(int.from_bytes(take(4), "little")):
        name = take(int.from_bytes(take(4), "little")).decode(errors="replace")
        runs.append((name, int.from_bytes(take(4), "little")))
    if (len(says) - at) != DIGEST * sum(count for _, count in runs):
        raise WireError("a frame that asks for pages does not have as many names as it says")
    return [(name, take(DIGEST)) for name, count in runs for _ in range(count)]
