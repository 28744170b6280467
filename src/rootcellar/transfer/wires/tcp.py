"""Frames over TCP: a head of fixed length, what the frame says, and bytes that go to and come from where they lie.

    magic 4 | kind 1 | - 3 | length of what it says 4 | sum 4 | length of the bytes 8 | checksum 8 | checksum 8
    what it says | the bytes

The sum (XXH32) is over the rest of the head: a length that was damaged would be waited for as long as the other side
is alive. The first checksum (XXH3) is over what it says, and is looked at before that is believed: by it is known where
the bytes go. The second is over the bytes. What does not fit ends the connection. A socket has a deadline for each of
its calls: whoever neither says nor takes a byte for so long is taken for dead.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from time import sleep
from typing import Protocol

import xxhash

from rootcellar.tiers.store import Block

_HEAD = struct.Struct("<4sB3xIIQQQ")
_MAGIC = b"rcw2"
_BLOCKS = 512
_MOST_SAID = 64 << 20
"""Bytes that a frame may say: more is no frame of ours."""
_PIECE = 1 << 20
_AGAIN = 0.05
"""Seconds after which a listener that could take nobody tries again."""


class WireError(OSError):
    """What came is not what was sent, or not from who it seemed."""


class AnySocket(Protocol):
    """What a connection needs of a socket."""

    def sendmsg(self, buffers: Sequence[Block], /) -> int:
        """Send some of these bytes; how many."""
        ...

    def recv_into(self, buffer: memoryview, /) -> int:
        """Fill some of the buffer; how much, 0 at the end."""
        ...

    def shutdown(self, how: int, /) -> None:
        """End what is under way."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@dataclass(frozen=True, slots=True)
class Saying:
    """What came: ``says``, and that ``nbytes`` follow, which :meth:`Framed.fill` takes."""

    kind: int
    says: bytes
    nbytes: int
    checksum: int


class Framed:
    """One connection. One thread may send while another receives; closing is for any thread."""

    def __init__(self, plain: AnySocket) -> None:
        self._socket = plain

    def send(self, kind: int, says: bytes = b"", blocks: Sequence[Block] = ()) -> None:
        """Send a frame, its bytes from where they lie. Raises ``OSError``."""
        views = [view for block in blocks if (view := memoryview(block).cast("B")).nbytes]
        nbytes = sum(view.nbytes for view in views)
        digest = xxhash.xxh3_64()
        for view in views:
            digest.update(view)
        head = _head(kind, len(says), nbytes, xxhash.xxh3_64_intdigest(says), digest.intdigest())
        waiting = [memoryview(head + says), *views]
        at = 0
        while at < len(waiting):
            sent = self._socket.sendmsg(waiting[at : at + _BLOCKS])
            while sent:
                if sent >= waiting[at].nbytes:
                    sent -= waiting[at].nbytes
                    at += 1
                else:
                    waiting[at] = waiting[at][sent:]
                    sent = 0

    def receive(self) -> Saying:
        """The next frame; if bytes follow, ``fill`` comes before the next. Raises ``OSError``, also at the end."""
        head = bytearray(_HEAD.size)
        self._into(memoryview(head))
        magic, kind, length, _, nbytes, said, checksum = _HEAD.unpack(head)
        if magic != _MAGIC or length > _MOST_SAID or head != _head(kind, length, nbytes, said, checksum):
            raise WireError("what came is no frame: the other side speaks another protocol, or bytes were damaged")
        says = bytearray(length)
        self._into(memoryview(says))
        frame = Saying(kind, bytes(says), nbytes, checksum)
        if xxhash.xxh3_64_intdigest(frame.says) != said:
            raise _damaged(kind)
        return frame

    def fill(self, frame: Saying, views: Sequence[memoryview]) -> None:
        """Take the bytes of a frame into ``views``, which have its length. Raises ``OSError``: they were damaged, too.

        What the views then hold means nothing.
        """
        if sum(view.nbytes for view in views) != frame.nbytes:
            raise WireError(f"a frame of kind {frame.kind} brings {frame.nbytes} bytes, which nobody asked for")
        digest = xxhash.xxh3_64()
        for view in views:
            flat = view.cast("B")
            self._into(flat)
            digest.update(flat)
        if digest.intdigest() != frame.checksum:
            raise _damaged(frame.kind)

    def stop(self) -> None:
        """End what is under way, from any thread: it raises ``OSError``."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _into(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = self._socket.recv_into(view[done : done + _PIECE])
            if count == 0:
                raise ConnectionError("the other side ended the connection")
            done += count


def _head(kind: int, length: int, nbytes: int, said: int, checksum: int) -> bytes:
    summed = xxhash.xxh32_intdigest(_HEAD.pack(_MAGIC, kind, length, 0, nbytes, said, checksum))
    return _HEAD.pack(_MAGIC, kind, length, summed, nbytes, said, checksum)


def _damaged(kind: int) -> WireError:
    return WireError(f"a frame of kind {kind} was damaged on the way: its checksum does not fit")


def listen(host: str) -> socket.socket:
    """Where others may connect, on a free port. Raises ``OSError``."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, 0), family=family, backlog=256)


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """A socket whose calls take ``deadline`` seconds at most. Raises ``OSError``."""
    plain = socket.create_connection((host, port), deadline)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plain


def accept(listener: socket.socket, deadline: float) -> socket.socket | None:
    """The next that connects, as :func:`connect`; None: the listener was shut down."""
    while True:
        try:
            plain, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBADF):
                return None
            sleep(_AGAIN)  # whoever came is gone, or there are too many open files: it may be better soon
            continue
        plain.settimeout(deadline)
        with contextlib.suppress(OSError):  # whoever receives hears that it is gone
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return plain


def end_listening(listener: socket.socket) -> None:
    """Listen no more: who waits in :func:`accept` is told."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
