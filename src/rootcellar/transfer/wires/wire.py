"""A way for pages beside the connection on which two nodes talk: a prefill node lends memory, a decode node fetches it.

What is lent stays until the decode node says that it has it, or is gone. It is fetched into memory of the wire's own
and goes from there to where it belongs: a transfer that is late writes where nobody reads, whoever has the row by then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic, sleep
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
"""Flat."""
_SOON, _LATER = 2e-5, 2e-3
"""Seconds between two looks at what is on its way, at first and at most."""


def look_until(over: Callable[[], bool], until: float) -> None:
    """Look whether it is ``over`` until it is; ``TimeoutError`` at the moment ``until`` of the monotonic clock."""
    pause = _SOON
    while not over():
        if monotonic() >= until:
            raise TimeoutError("it did not come in time")
        sleep(pause)
        pause = min(_LATER, 2 * pause)


class PageWire(Protocol):
    """One node's end of it; on any thread."""

    @property
    def address(self) -> str:
        """How the other node reaches it; said by the bootstrap service."""
        ...

    @property
    def lent(self) -> int:
        """Bytes that are lent."""
        ...

    def lend(self, images: Bytes, patience: float) -> bytes | None:
        """A ticket for a copy of ``images``; None: there was no room for it for ``patience`` seconds."""
        ...

    def withdraw(self, ticket: bytes) -> None:
        """Nobody fetches it any more."""
        ...

    def fetch(self, address: str, ticket: bytes, nbytes: int, deadline: float) -> AbstractContextManager[Bytes]:
        """What was lent at an address, as long as the context is entered.

        ``deadline``: seconds. Raises ``OSError``: it did not come.
        """
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...
