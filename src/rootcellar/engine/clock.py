"""The engine's one clock: deadlines, pins' ends and every time that is measured are asked of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """What tells the time. ``now``: seconds since some fixed moment, never fewer than before; tests hold it."""

    now: Callable[[], float] = time.perf_counter
