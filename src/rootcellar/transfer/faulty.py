"""A wire that breaks, for tests: a socket that is late, cuts, gives other bytes or falls silent, by a seed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rootcellar.tiers.store import Block

_EACH = 1 << 16
"""Most bytes that one call takes, so that there are more of them."""


@dataclass(frozen=True)
class WireFaults:
    """How likely each is at each call, 0 to 1; ``late``: most seconds of a delay."""

    delay: float = 0.0
    cut: float = 0.0
    corrupt: float = 0.0
    hang: float = 0.0
    late: float = 0.002


class FaultyWires:
    """Makes sockets that break; what happened is counted in ``seen``."""

    def __init__(self, faults: WireFaults, seed: int) -> None:
        self.faults = faults
        self.seen = dict.fromkeys(("delay", "cut", "corrupt", "hang"), 0)
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()

    def __call__(self, plain: socket.socket) -> FaultySocket:
        """``plain``, which may break."""
        return FaultySocket(plain, self)

    def happens(self, fault: str, likely: float) -> bool:
        """Whether a fault happens now."""
        with self._lock:
            happens = bool(self._random.random() < likely)
            self.seen[fault] += happens
        return happens

    def below(self, most: int) -> int:
        """A number from 0 on, less than ``most``."""
        with self._lock:
            return int(self._random.integers(most))


class FaultySocket:
    """A socket as ``tcp.Framed`` uses it, but for its faults."""

    def __init__(self, plain: socket.socket, wires: FaultyWires) -> None:
        self._plain = plain
        self._wires = wires
        self._ended = threading.Event()

    def sendmsg(self, buffers: Sequence[Block], /) -> int:
        """See ``AnySocket``."""
        self._strain()
        return self._plain.sendmsg([memoryview(buffers[0])[:_EACH]])

    def recv_into(self, buffer: memoryview, /) -> int:
        """See ``AnySocket``."""
        self._strain()
        count = self._plain.recv_into(buffer[:_EACH])
        if count and self._wires.happens("corrupt", self._wires.faults.corrupt):
            buffer[self._wires.below(count)] ^= 1 << self._wires.below(8)
        return count

    def shutdown(self, how: int, /) -> None:
        """See ``AnySocket``."""
        self._ended.set()
        self._plain.shutdown(how)

    def close(self) -> None:
        """See ``AnySocket``."""
        self._ended.set()
        self._plain.close()

    def _strain(self) -> None:
        faults = self._wires.faults
        if self._wires.happens("delay", faults.delay):
            self._ended.wait(faults.late * self._wires.below(1000) / 1000)
        if self._wires.happens("cut", faults.cut):
            self._plain.shutdown(socket.SHUT_RDWR)
        if self._wires.happens("hang", faults.hang):
            # As a network that loses everything: nothing goes and nothing comes until somebody gives up.
            self._ended.wait(self._plain.gettimeout())
            raise TimeoutError("timed out")
