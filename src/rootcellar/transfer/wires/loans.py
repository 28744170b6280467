"""Memory that a wire knows, lent a piece at a time, and reads of another node's memory, which may be late."""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import numpy as np

from rootcellar.transfer.wires.wire import Bytes, look_until

Poll = Callable[[], bool]
"""Whether a read is done. Raises ``OSError`` once it failed."""
Begin = Callable[[int, int, int], Poll]
"""Begins to read: from an address of the other node's memory, to one of ours, so many bytes."""
_PLACE = struct.Struct("<Q")


class Loans:
    """Tickets are addresses in it."""

    def __init__(self, nbytes: int) -> None:
        """Of so many bytes, from a page of the machine's on."""
        self.memory: Bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        self._changed = threading.Condition()
        self._taken: dict[int, int] = {}
        """Where each piece begins, and how long it is, in this order."""
        self._late: list[tuple[int, Poll]] = []
        """Pieces that a read nobody waits for may still write to."""

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.memory.ctypes.data)

    @property
    def lent(self) -> int:
        """Bytes that are taken."""
        with self._changed:
            return sum(self._taken.values())

    def lend(self, images: Bytes, patience: float) -> bytes | None:
        """See ``PageWire``."""
        at = self._take(images.nbytes, patience)
        if at is None:
            return None
        self.memory[at : at + images.nbytes] = images
        return _PLACE.pack(self.address + at)

    def withdraw(self, ticket: bytes) -> None:
        """See ``PageWire``."""
        self._give_back(_PLACE.unpack(ticket)[0] - self.address)

    @contextmanager
    def fetch(self, begin: Begin, ticket: bytes, nbytes: int, deadline: float) -> Iterator[Bytes]:
        """What another node lent; see ``PageWire``."""
        until = monotonic() + deadline
        if len(ticket) != _PLACE.size:
            raise ConnectionError("what is lent should be an address")
        at = self._take(nbytes, deadline)
        if at is None:
            raise TimeoutError("there was no room for what is to be fetched")
        late: Poll | None = None
        try:
            late = poll = begin(_PLACE.unpack(ticket)[0], self.address + at, nbytes)
            look_until(lambda: _over(poll), until)
            late = None
            poll()
            yield self.memory[at : at + nbytes]
        finally:
            if late is None:
                self._give_back(at)
            else:
                with self._changed:
                    self._late.append((at, late))

    def _take(self, nbytes: int, patience: float) -> int | None:
        """Where a piece begins, from 0 on; None: there was no room for so many seconds."""
        if not 0 < nbytes <= len(self.memory):
            raise ConnectionError(f"{nbytes} bytes do not fit into {len(self.memory)}")
        with self._changed:
            over = [at for at, poll in self._late if _over(poll)]
            self._late = [(at, poll) for at, poll in self._late if at not in over]
            for at in over:
                del self._taken[at]
            self._changed.wait_for(lambda: self._gap(nbytes) is not None, patience)
            gap = self._gap(nbytes)
            if gap is not None:
                self._taken = dict(sorted([*self._taken.items(), (gap, nbytes)]))
            return gap

    def _give_back(self, at: int) -> None:
        with self._changed:
            if self._taken.pop(at, None) is not None:
                self._changed.notify_all()

    def _gap(self, nbytes: int) -> int | None:
        begin = 0
        for at, length in self._taken.items():
            if at - begin >= nbytes:
                return begin
            begin = at + length
        return begin if len(self.memory) - begin >= nbytes else None


class LendingWire:
    """What wires over memory that they know have in common; see ``PageWire``. ``address``: see there."""

    address: str

    def __init__(self, nbytes: int) -> None:
        """``nbytes``: what can be lent or fetched at once."""
        self._loans = Loans(nbytes)

    @property
    def lent(self) -> int:
        """See ``PageWire``."""
        return self._loans.lent

    def lend(self, images: Bytes, patience: float) -> bytes | None:
        """See ``PageWire``."""
        return self._loans.lend(images, patience)

    def withdraw(self, ticket: bytes) -> None:
        """See ``PageWire``."""
        self._loans.withdraw(ticket)


def _over(poll: Poll) -> bool:
    """Whether a read writes nothing more, well or not."""
    try:
        return poll()
    except OSError:
        return True
