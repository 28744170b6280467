"""JAX's own transfer servers (``jax.experimental.transfer``): the decode node pulls arrays of the prefill node.

Arrays are the CPU device's, so that what is sent is what other wires send. JAX has no way to take back what is lent and
never pulled: it keeps that as long as the process lives.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from rootcellar.errors import ConfigError
from rootcellar.transfer.wires.arrays import start_server
from rootcellar.transfer.wires.tcp import WireError
from rootcellar.transfer.wires.wire import Bytes, look_until

_TICKET = struct.Struct("<Q")


class JaxWire:
    """See ``PageWire``."""

    def __init__(self, host: str, nbytes: int) -> None:
        """Listen on ``host``; ``nbytes``: what can be lent at once. Raises ``ConfigError``."""
        self._device = jax.local_devices(backend="cpu")[0]
        self._most, self._changed = nbytes, threading.Condition()
        self._lent: dict[bytes, int] = {}
        self._connections: dict[str, Any] = {}
        try:
            self._server = start_server(self._device, host)
        except Exception as error:  # of XLA's own kind
            raise ConfigError(f"JAX's transfer server cannot listen on {host}: {error}") from None
        self.address = str(self._server.address())

    @property
    def lent(self) -> int:
        """See ``PageWire``."""
        with self._changed:
            return sum(self._lent.values())

    def lend(self, images: Bytes, patience: float) -> bytes | None:
        """See ``PageWire``."""
        with self._changed:
            room = self._most - images.nbytes
            if not self._changed.wait_for(lambda: sum(self._lent.values()) <= room, patience):
                return None
            ticket = _TICKET.pack(secrets.randbits(63))
            self._lent[ticket] = images.nbytes
        self._server.await_pull(*_TICKET.unpack(ticket), [jax.device_put(images, self._device)])
        return ticket

    def withdraw(self, ticket: bytes) -> None:
        """See ``PageWire``."""
        with self._changed:
            self._lent.pop(ticket, None)
            self._changed.notify_all()

    @contextmanager
    def fetch(self, address: str, ticket: bytes, nbytes: int, deadline: float) -> Iterator[Bytes]:
        """See ``PageWire``."""
        until = monotonic() + deadline
        if len(ticket) != _TICKET.size:
            raise ConnectionError("what is lent should be a number")
        described: Any = jax.ShapeDtypeStruct
        wanted = described((nbytes,), np.uint8, sharding=SingleDeviceSharding(self._device))
        try:
            with self._changed:
                if address not in self._connections:
                    self._connections[address] = self._server.connect(address)
                connection = self._connections[address]
            (array,) = connection.pull(*_TICKET.unpack(ticket), [wanted])
            look_until(array.is_ready, until)
            found = np.asarray(array)
        except TimeoutError:
            raise
        except Exception as error:  # of XLA's own kind
            with self._changed:
                self._connections.pop(address, None)
            raise WireError(f"JAX could not pull from {address}: {error}") from None
        yield found

    def close(self) -> None:
        """See ``PageWire``."""
        self._connections.clear()
