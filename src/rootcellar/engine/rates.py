"""How fast bytes come from farther tiers, and prompts are computed: what loading and computing are weighed with."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

from rootcellar.scheduler import Rates, TierRate

_STEPS = 15
_LEAST = 16
"""Tokens of a step below which its time says little about computing many."""
_SAMPLES = 8


class Prefills:
    """How fast the last steps of prefill were: their median, since the first of a shape compiles.

    Nobody waits for a step that gives no token, so its time is that of the next one that does.
    """

    def __init__(self) -> None:
        self._speeds: deque[float] = deque(maxlen=_STEPS)
        self._tokens = 0
        self._seconds = 0.0

    def step(self, tokens: int, seconds: float, *, ended: bool) -> None:
        """A step took so long; it computed so many tokens of prompts. ``ended``: it gave somebody a token."""
        if tokens or self._tokens:
            self._tokens += tokens
            self._seconds += seconds
            if ended:
                if self._tokens >= _LEAST and self._seconds > 0:
                    self._speeds.append(self._tokens / self._seconds)
                self._tokens, self._seconds = 0, 0.0

    @property
    def speed(self) -> float:
        """Tokens a second; 0 before the first."""
        return median(self._speeds) if self._speeds else 0.0


class _Lane:
    """What a lane of the mover did lately."""

    def __init__(self) -> None:
        self._before = 0.0, 0.0
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        self._at = 0.0

    def read(self, stats: Mapping[str, float], now: float) -> TierRate:
        """Take its totals."""
        total = stats["bytes"], stats["seconds"]
        if total[0] > self._before[0]:
            self._samples.append((total[0] - self._before[0], total[1] - self._before[1]))
            self._before, self._at = total, now
        nbytes, seconds = map(sum, zip(*self._samples, strict=True)) if self._samples else (0.0, 0.0)
        return TierRate(nbytes / seconds if seconds > 0 else 0.0, int(stats["queued_bytes"]), self._at)


class Meter:
    """Makes rates of what a mover and the steps of prefill did."""

    def __init__(self) -> None:
        self.prefills = Prefills()
        self._host, self._storage = _Lane(), _Lane()

    def rates(self, stats: Mapping[str, Mapping[str, float]], now: float) -> Rates:
        """``stats``: those of the mover; ``now``: by the engine's clock, in seconds."""
        return Rates(
            self.prefills.speed,
            self._host.read(stats["host-device"], now),
            self._storage.read(stats["storage-host"], now),
        )
