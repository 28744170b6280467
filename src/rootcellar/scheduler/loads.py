"""Load or recompute: whether what a farther tier has of a prompt is there sooner than it would be computed.

Both times are estimates from what was measured lately (:class:`Rates`). What was not measured is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from rootcellar.cache import Hit, Kind, Tier

MEASURED_AGAIN = 60.0
"""Seconds after which a tier that seemed too slow is tried again: nothing else would show that it is not any more."""


@dataclass(frozen=True, slots=True)
class TierRate:
    """How a tier gave its bytes to the next nearer one.

    ``speed``: bytes a second, 0 where none came yet; ``queued``: bytes that wait to come; ``at``: when some came last,
    in seconds of the engine's clock.
    """

    speed: float = 0.0
    queued: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured; ``prefill``: prompt tokens computed in a second, 0 where none were yet."""

    prefill: float = 0.0
    host: TierRate = TierRate()
    storage: TierRate = TierRate()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether ``tokens`` that ``tier`` has more than nearer ones are loaded, or computed, and why.

    Attributes:
        nbytes: what loading them copies.
        load_seconds, compute_seconds: what each takes, as far as is known; None: not measured yet.
    """

    tier: Tier
    tokens: int
    nbytes: int
    load_seconds: float | None
    compute_seconds: float | None
    load: bool

    def fields(self) -> dict[str, object]:
        """As plain values."""
        return {
            "tier": self.tier.name.lower(),
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "load_seconds": self.load_seconds,
            "compute_seconds": self.compute_seconds,
            "load": self.load,
        }


class Loads:
    """Weighs loading against computing."""

    def __init__(
        self, kinds: Sequence[Kind], page_size: int, image_bytes: Mapping[str, int], *, always: bool = False
    ) -> None:
        """``image_bytes``: of a page, or of a state, by the name of its kind. ``always``: load whatever there is."""
        self._kinds = [(kind, image_bytes[kind.name]) for kind in kinds]
        self._page_size = page_size
        self._always = always
        self._rates = Rates()
        self._now = 0.0

    def learn(self, rates: Rates, now: float) -> None:
        """``rates`` were measured; it is ``now`` (seconds of the engine's clock)."""
        self._rates, self._now = rates, now

    @classmethod
    def of_all(cls) -> Self:
        """Loads whatever there is: nothing is known of times."""
        return cls((), 1, {})

    def farthest(self, hit: Hit) -> Tier:
        """The tier from which to open a hit: HOST where loading pays; STORAGE comes to HOST first (``Prefetcher``)."""
        near, far = hit.length, hit.reach(Tier.HOST)
        return Tier.HOST if far > near and self.weigh(Tier.HOST, near, far).load else Tier.DEVICE

    def reach(self, hit: Hit) -> int:
        """Tokens that need not be computed after a hit."""
        return hit.reach(self.farthest(hit))

    def decided(self, hit: Hit) -> list[Decision]:
        """What :meth:`farthest` decided, if there was something to decide."""
        near, far = hit.length, hit.reach(Tier.HOST)
        return [self.weigh(Tier.HOST, near, far)] if far > near else []

    def weigh(self, tier: Tier, near: int, far: int) -> Decision:
        """Whether ``tier`` is to give tokens ``[near, far)``."""
        rates, size = self._rates, self._page_size
        nbytes = 0
        for kind, each in self._kinds:
            if kind.rule == "recurrent":
                nbytes += each
            else:
                first = max(kind.start(far), near) // size
                nbytes += (-(-far // size) - first) * each
        sources = (rates.host,) if tier is Tier.HOST else (rates.storage, rates.host)
        known = all(source.speed for source in sources)
        load = sum((source.queued + nbytes) / source.speed for source in sources) if known else None
        compute = (far - near) / rates.prefill if rates.prefill else None
        stale = self._now - sources[0].at > MEASURED_AGAIN
        pays = self._always or load is None or compute is None or load <= compute or stale
        return Decision(tier, far - near, nbytes, load, compute, pays)
