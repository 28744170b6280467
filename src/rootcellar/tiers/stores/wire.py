"""Connections to the servers of stores: bytes out of and into memory that is there already, and a pool of them."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_AHEAD = 1 << 16
_PARTS = 512
_BIG = 1 << 20
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a host and a port, or else a ``path`` of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 0
    path: str | None = None
    timeout: float = 5.0
    """Seconds without a byte after which a connection is given up."""
    tls: bool = False
    ca_certs: str | None = None
    """The certificates to trust, a file; None: those of the system."""

    def connect(self) -> socket.socket:
        """A connection. Raises ``OSError``."""
        if self.path is not None:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                plain.settimeout(self.timeout)
                plain.connect(self.path)
            except BaseException:
                plain.close()
                raise
            return plain
        plain = socket.create_connection((self.host, self.port), self.timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.tls:
            return plain
        try:
            return ssl.create_default_context(cafile=self.ca_certs).wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise

    def __str__(self) -> str:
        """To be shown."""
        return self.path or f"{self.host}:{self.port}"


class Wire:
    """One connection, of one thread at a time."""

    def __init__(self, address: Address) -> None:
        """Connect. Raises ``OSError``."""
        self._socket = address.connect()
        self._gathers = not address.tls
        self._ahead = bytearray(_AHEAD)
        self._from = self._to = 0

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all these bytes."""
        views = [memoryview(part).cast("B") for part in parts]
        if not self._gathers:
            for view in views:
                self._socket.sendall(view)
            return
        at = 0
        while at < len(views):
            sent = self._socket.sendmsg(views[at : at + _PARTS])
            while sent or (at < len(views) and not len(views[at])):
                if sent >= len(views[at]):
                    sent -= len(views[at])
                    at += 1
                else:
                    views[at] = views[at][sent:]
                    sent = 0

    def into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes. Raises ``ConnectionError`` where the server ends before them."""
        done = min(len(view), self._to - self._from)
        view[:done] = self._ahead[self._from : self._from + done]
        self._from += done
        while done < len(view):
            done += self._some(view[done : done + _BIG])

    def line(self) -> bytes:
        """The next bytes until CR LF, without these."""
        while (end := self._ahead.find(b"\r\n", self._from, self._to)) < 0:
            rest = self._to - self._from
            if rest == _AHEAD:
                raise OSError("the server says what it should not: a line without an end")
            self._ahead[:rest] = self._ahead[self._from : self._to]
            self._from, self._to = 0, rest + self._some(memoryview(self._ahead)[rest:])
        line = bytes(self._ahead[self._from : end])
        self._from = end + 2
        return line

    def skip(self, nbytes: int) -> None:
        """Read so many bytes and forget them."""
        waste = memoryview(bytearray(min(nbytes, _BIG)))
        while nbytes:
            some = min(nbytes, len(waste))
            self.into(waste[:some])
            nbytes -= some

    def exactly(self, nbytes: int) -> bytes:
        """The next so many bytes."""
        read = bytearray(nbytes)
        self.into(memoryview(read))
        return bytes(read)

    def acknowledge(self) -> None:
        """Tell the server now that all has come: one that sends a small answer after the other, and has not asked for
        TCP_NODELAY, waits for that before the next, and the system would tell it after 40 ms.
        """
        if sys.platform == "linux" and self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def stop(self) -> None:
        """End what is under way on it, from another thread: it raises ``OSError``."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()

    def _some(self, view: memoryview) -> int:
        count = self._socket.recv_into(view)
        if count == 0:
            raise ConnectionError("the server ended the connection")
        return count


class Wires:
    """Connections to one server, as many as calls are under way at once."""

    def __init__(self, address: Address, greet: Callable[[Wire], None] | None = None) -> None:
        """``greet`` says what a new connection begins with. None is made yet."""
        self.address = address
        self._greet = greet
        self._lock = threading.Lock()
        self._free: list[Wire] = []
        self._used: set[Wire] = set()
        self._closed = False

    def run(self, call: Callable[[Wire], _T]) -> _T:
        """``call`` with a connection, again with a new one where one that was used before turns out to have ended.

        Raises what ``call`` does, and ``ValueError`` after ``close``.
        """
        wire, new = self._take()
        try:
            try:
                result = call(wire)
            except ConnectionError:
                if new:
                    raise
                self._drop(wire)
                with self._lock:
                    stale, self._free = self._free, []
                for each in stale:
                    each.close()
                wire, new = self._take()
                result = call(wire)
        except BaseException:
            self._drop(wire)
            raise
        with self._lock:
            self._used.discard(wire)
            if self._closed:
                wire.close()
            else:
                self._free.append(wire)
        return result

    def close(self) -> None:
        """End all connections; calls that are under way raise ``OSError``."""
        with self._lock:
            self._closed = True
            for wire in self._used:
                wire.stop()
            for wire in self._free:
                wire.close()
            self._free.clear()

    def _take(self) -> tuple[Wire, bool]:
        with self._lock:
            if self._closed:
                raise ValueError("the store is closed")
            if self._free:
                wire, new = self._free.pop(), False
                self._used.add(wire)
                return wire, new
        wire = Wire(self.address)
        try:
            if self._greet is not None:
                self._greet(wire)
        except BaseException:
            wire.close()
            raise
        with self._lock:
            self._used.add(wire)
        return wire, True

    def _drop(self, wire: Wire) -> None:
        with self._lock:
            self._used.discard(wire)
        wire.close()
