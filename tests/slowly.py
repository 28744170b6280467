"""Requests that last, however fast the machine: so many tokens are so much time at least."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rootcellar.engine import Engine


@contextlib.contextmanager
def slowly(engine: Engine, seconds: float = 0.01) -> Iterator[None]:
    """Each step of ``engine`` takes at least so long meanwhile; between two of them it does what it is asked to."""
    machine = engine._loop.machine
    step = machine.step

    def slow(*given: Any) -> None:
        time.sleep(seconds)
        step(*given)

    machine.step = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        machine.step = step  # type: ignore[method-assign]
