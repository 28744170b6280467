"""One pair of tiers: the copies from the first to the second, done in order on a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from rootcellar.cache import Tier


@dataclass(frozen=True, slots=True)
class Shipment:
    """Copies that are done together: of ``moves``, all of one pool, so many pages and bytes, since ``began``."""

    lane: Lane
    moves: tuple[int, ...]
    pool: str
    pages: int
    nbytes: int
    began: float


@dataclass(slots=True)
class LaneStats:
    """What a lane did and has to do.

    ``seconds``: in which something was being copied, or waited for the device to be; ``queued_bytes``: not yet done;
    ``skipped_pages``: not copied because too much was queued, or no store was there; ``failed_pages``: since something
    broke, or a store had no room for them or no longer had them; ``deadline_pages``: since a store was left before.
    """

    moves: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    queued_bytes: int = 0
    skipped_pages: int = 0
    failed_pages: int = 0
    deadline_pages: int = 0


class Lane:
    """A queue and the thread that empties it.

    ``tell(shipment, result, error)`` is called on the thread when a shipment's work is done, with what came of it.
    """

    def __init__(self, src: Tier, dst: Tier, tell: Callable[[Shipment, object, Exception | None], None]) -> None:
        self.src, self.dst = src, dst
        self.stats = LaneStats()
        self._tell = tell
        self._work: queue.SimpleQueue[tuple[Shipment, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"rootcellar-{self.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """As ``"device-host"``."""
        return f"{self.src.name}-{self.dst.name}".lower()

    def put(self, shipment: Shipment, work: Callable[[], object]) -> None:
        """Do ``work`` when all before it is done."""
        self._work.put((shipment, work))

    def close(self) -> None:
        """Do what is queued, and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = 0.0
        while (item := self._work.get()) is not None:
            shipment, work = item
            result, error = None, None
            try:
                result = work()
            except Exception as failure:  # whatever it was, the next may succeed
                error = failure
            before, ended = ended, perf_counter()
            self.stats.seconds += ended - max(shipment.began, before)
            self._tell(shipment, result, error)
            del item, work  # and what they hold
