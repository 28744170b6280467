"""Arrays from the devices of one process to those of another, by JAX's transfer server: a trainer's weights.

    a trainer                                   an engine
    arrays = Arrays("127.0.0.1")
    number = arrays.offer([...])
    (says host, port, number, shapes)  ──────▶  source = Source(host, port, timeout)
                                       ◀──────  source.fetch(number, shapes, timeout)

Neither side writes to the other: what is fetched becomes new arrays, on the device, and what is offered is held until
it was fetched. JAX waits for ever for a peer that falls silent and for a number that nobody offers, so each wait is a
thread's of its own, which is left behind when its time is over.
"""

from __future__ import annotations

import functools
import itertools
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
from jax import Array
from jax.experimental import transfer

from rootcellar.transfer.wires.tcp import WireError

_NUMBERS = itertools.count()
T = TypeVar("T")


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


class Source:
    """The engine's side: another process's arrays. ``broken``: why nothing more comes from there; None: it may."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        """Find who listens there. ``WireError``: nobody does, or what does is none of JAX's transfer servers."""
        self.name = f"{host}:{port}"
        self.broken: str | None = None
        try:
            with socket.create_connection((host, port), timeout) as probe:
                here, there = probe.getsockname()[0], probe.getpeername()[0]
        except OSError as error:
            raise WireError(f"nobody answers at {self.name}: {error}") from error
        self._connection = _within(timeout, lambda: _server(here).connect(f"{_bracketed(there)}:{port}"), self.name)

    def fetch(self, number: int, shapes: Sequence[jax.ShapeDtypeStruct], timeout: float) -> list[Array]:
        """What was offered by ``number``: arrays of these shapes and dtypes, where their shardings say.

        Raises:
            WireError: they did not come within ``timeout`` seconds, or are others; nothing more is fetched here then.
        """
        if self.broken is not None:
            raise WireError(self.broken)

        def pull() -> list[Array]:
            arrays: list[Array] = jax.block_until_ready(self._connection.pull(number, list(shapes)))
            return arrays

        try:
            return _within(timeout, pull, self.name)
        except WireError as error:
            self.broken = f"{error}; open the group anew (init_weights_update_group)"
            raise WireError(self.broken) from error


@functools.cache
def _server(host: str) -> Any:
    """This process's transfer server on an interface: there is one, as JAX ends none."""
    at = f"{_bracketed(host)}:0"
    return transfer.start_transfer_server(jax.devices()[0].client, at, [at])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _within(timeout: float, function: Callable[[], T], name: str) -> T:
    """What ``function`` gives; ``WireError`` where it raises, or is not done after ``timeout`` seconds."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="arrays", daemon=True).start()
    try:
        return done.result(timeout)
    except TimeoutError:
        raise WireError(f"{name} gave nothing within {timeout:g} seconds") from None
    except Exception as error:
        raise WireError(f"{name} did not give what was asked for: {str(error).partition(chr(10))[0]}") from error
