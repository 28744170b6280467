"""Arrays from the devices of one process to those of another, by JAX's transfer server: a trainer's weights.

    a trainer                                   an engine
    arrays = Arrays("127.0.0.1")
    number = arrays.offer([...])
    (says host, port, number, shapes)  ──────▶  source = ArraySource(host, port, timeout)
                                       ◀──────  source.fetch(number, shapes, timeout)

Neither side writes to the other: what is fetched becomes new arrays, on the device, and what is offered is held until
it was fetched. JAX waits for ever for a peer that falls silent and for a number that nobody offers; what it fetches is
there some time or never, so it is looked at until its time is over.
"""

from __future__ import annotations

import functools
import itertools
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.experimental import transfer

from rootcellar.transfer.wires.tcp import WireError
from rootcellar.transfer.wires.wire import look_until

_NUMBERS = itertools.count()


class Arrays:
    """The trainer's side: arrays that wait to be fetched, at ``port`` of the interface with the address ``host``."""

    def __init__(self, host: str) -> None:
        self._server = _server(host)
        self.port = int(self._server.address().rpartition(":")[2])

    def offer(self, arrays: Sequence[Array]) -> int:
        """Hold ``arrays`` until they were fetched, once, by the number that this gives. JAX cannot take it back."""
        number = next(_NUMBERS)
        self._server.await_pull(number, list(arrays))
        return number


class ArraySource:
    """The engine's side: another process's arrays. ``broken``: why nothing more comes from there; None: it may."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        """Find who listens there. ``WireError``: nobody does."""
        self.name = f"{host}:{port}"
        self.broken: str | None = None
        try:
            with socket.create_connection((host, port), timeout) as probe:
                here, there = probe.getsockname()[0], probe.getpeername()[0]
        except (OSError, UnicodeError) as error:
            raise WireError(f"nobody answers at {self.name}: {error}") from error
        try:
            self._connection = _server(here).connect(f"{_bracketed(there)}:{port}")
        except jax.errors.JaxRuntimeError as error:
            raise WireError(f"{self.name} cannot be spoken to: {error}") from error

    def fetch(self, number: int, shapes: Sequence[jax.ShapeDtypeStruct], timeout: float) -> list[Array]:
        """What was offered by ``number``: arrays of these shapes and dtypes, where their shardings say.

        Raises:
            WireError: they did not come within ``timeout`` seconds, or are others; nothing more is fetched here then.
        """
        if self.broken is not None:
            raise WireError(self.broken)

        try:
            arrays: list[Any] = self._connection.pull(number, list(shapes))
            until = time.monotonic() + timeout
            for array in arrays:
                look_until(array.is_ready, until)
                array.block_until_ready()  # or what went wrong
        except TimeoutError:
            self.broken = f"{self.name} gave nothing within {timeout:g} seconds"
        except jax.errors.JaxRuntimeError as error:
            why = str(error).partition("\n")[0]
            self.broken = f"{self.name} did not give what was asked for: {why}"
        else:
            return arrays
        self.broken += "; open the group anew (init_weights_update_group)"
        raise WireError(self.broken)


@functools.cache
def _server(host: str) -> Any:
    """This process's transfer server on an interface: there is one, as JAX ends none."""
    return start_server(jax.devices()[0], _bracketed(host))


def start_server(device: jax.Device, host: str) -> Any:
    """A transfer server of a device's client, at a port of its choice."""
    at = f"{host}:0"
    # The second address is for the bytes themselves: without it they go by the connection of the first.
    return transfer.start_transfer_server(device.client, at, [at])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
