"""Carries out the copies that the cache decides on, between the device and host memory.

The thread that runs the steps hands over ``cache.moves()`` before each of them, and takes the reports between them.
Bytes are copied on the lanes' threads (``lane.py``); what has to be in order with steps, reading the device and writing
it, is begun by the thread of the steps. Nothing here waits for a copy but ``drain``: what would make a lane too long is
skipped, reported ``Failed`` and counted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from time import perf_counter

import numpy as np

from rootcellar.cache import Done, Event, Failed, Move, Tier
from rootcellar.pools.copying import Copier, Fetched, PageNumbers
from rootcellar.pools.images import Images, Rows
from rootcellar.tiers.lane import Lane, Shipment

log = logging.getLogger(__name__)

MOST_QUEUED = 256 * 2**20
"""Bytes that wait to be written down at most, or what one node has; gathered, they lie in the device's memory."""
TOGETHER = 64
"""Pages that are copied at once, or those of one move if they are more."""


class Mover:
    """Moves pages between the device's pools and images in host memory."""

    def __init__(
        self,
        device: Mapping[str, Copier],
        host: Mapping[str, Images],
        pool_of: Mapping[str, str],
        *,
        most_queued: int = MOST_QUEUED,
    ) -> None:
        """``device`` and ``host``: what copies a pool's pages, and the rows of its images, by the pool's name.

        ``pool_of``: the pool of each kind. ``most_queued``: see ``MOST_QUEUED``.
        """
        self._device, self._host, self._pool_of = device, host, pool_of
        self._most_queued = most_queued
        self._down = Lane(Tier.DEVICE, Tier.HOST, self._ended)
        self._up = Lane(Tier.HOST, Tier.DEVICE, self._ended)
        self._targets: dict[Shipment, PageNumbers] = {}
        """Pages that shipments write once their images are fetched."""
        self._changed = threading.Condition()
        self._news: list[Event] = []
        self._fetched: list[tuple[Shipment, Fetched]] = []
        """Images that the steps' thread has to write."""
        self._under_way = 0
        """Shipments that are not in the news yet."""
        self._wake: Callable[[], None] = _nobody

    def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, on any thread, when there is something to report that nobody was told of."""
        self._wake = wake

    # -- on the thread that runs the steps --------------------------------------------------------------------------

    def dispatch(self, moves: Sequence[Move], *, patient: bool = False) -> None:
        """Begin these copies. Sources on the device are read, and pages there written, before the next step runs.

        ``patient``: wait for room instead of skipping anything.
        """
        down = [move for move in moves if (move.src, move.dst) == (Tier.DEVICE, Tier.HOST)]
        up = [move for move in moves if (move.src, move.dst) == (Tier.HOST, Tier.DEVICE)]
        assert len(down) + len(up) == len(moves), "the cache was given no other tier"
        # What reads the device comes first: a page may be left by one move and written by another.
        for pool, some in self._together(down):
            self._read(pool, some, patient)
        for pool, some in self._together(up):
            self._load(pool, some)

    def _together(self, moves: Iterable[Move]) -> Iterator[tuple[str, list[Move]]]:
        """Moves of one pool, in order, in groups of about ``TOGETHER`` pages."""
        by_pool: dict[str, list[Move]] = {}
        for move in moves:
            by_pool.setdefault(self._pool_of[move.kind], []).append(move)
        for pool, some in by_pool.items():
            group: list[Move] = []
            pages = 0
            for move in some:
                if group and pages + len(move.src_slots) > TOGETHER:
                    yield pool, group
                    group, pages = [], 0
                group.append(move)
                pages += len(move.src_slots)
            yield pool, group

    def _shipment(self, lane: Lane, pool: str, moves: Sequence[Move]) -> Shipment:
        pages = sum(len(move.src_slots) for move in moves)
        return Shipment(
            lane, tuple(move.id for move in moves), pool, pages, pages * self._host[pool].shape[1], perf_counter()
        )

    def _read(self, pool: str, moves: Sequence[Move], patient: bool) -> None:
        shipment = self._shipment(self._down, pool, moves)
        if not self._room_for(shipment, patient):
            self._down.stats.skipped_pages += shipment.pages
            self._tell([Failed(move) for move in shipment.moves])
            return
        pages, rows = _numbers(m.src_slots for m in moves), _numbers(m.dst_slots for m in moves) - 1
        self._begin(shipment, lambda: self._device[pool].read(pages, self._host[pool], rows), self._down.put)

    def _room_for(self, shipment: Shipment, patient: bool) -> bool:
        """Whether a shipment may be queued; ``patient``: it may, sooner or later."""
        stats = shipment.lane.stats
        with self._changed:
            while stats.queued_bytes and stats.queued_bytes + shipment.nbytes > self._most_queued:
                if not patient:
                    return False
                self._changed.wait()
        return True

    def _load(self, pool: str, moves: Sequence[Move]) -> None:
        shipment = self._shipment(self._up, pool, moves)
        copier, images = self._device[pool], self._host[pool]
        rows = _numbers(m.src_slots for m in moves) - 1
        self._targets[shipment] = _numbers(m.dst_slots for m in moves)
        if copier.in_place:
            self._begin(shipment, lambda: self._write(shipment, copier.fetch(images, rows)), self._up.put)
        else:
            self._begin(shipment, lambda: lambda: copier.fetch(images, rows), self._up.put)

    def _write(self, shipment: Shipment, fetched: Fetched) -> Callable[[], None]:
        return self._device[shipment.pool].write(self._targets.pop(shipment), fetched)

    def _begin(
        self,
        shipment: Shipment,
        begin: Callable[[], Callable[[], object]],
        put: Callable[[Shipment, Callable[[], object]], None],
        *,
        again: bool = False,
    ) -> None:
        """Begin a shipment, or go on with it, and leave the rest to its lane."""
        with self._changed:
            if not again:
                self._under_way += 1
                shipment.lane.stats.queued_bytes += shipment.nbytes
        try:
            rest = begin()
        except Exception as error:
            self._ended(shipment, None, error)
        else:
            put(shipment, rest)

    def reports(self) -> list[Event]:
        """What became of copies since the last call, without waiting. Writes to the device what was fetched for it."""
        with self._changed:  # all at once: whatever comes from here on wakes again
            fetched, self._fetched = self._fetched, []
            news, self._news = self._news, []
        for shipment, images in fetched:
            self._begin(shipment, partial(self._write, shipment, images), self._up.put, again=True)
        return news

    def drain(self) -> list[Event]:
        """Wait for all that is under way, then :meth:`reports`."""
        events = self.reports()
        while True:
            with self._changed:
                while self._under_way and not (self._news or self._fetched):
                    self._changed.wait()
                over = not self._under_way
            events += self.reports()
            if over:
                return events

    def stats(self) -> dict[str, dict[str, float]]:
        """Of each lane, by its name, what it did: see ``LaneStats``."""
        with self._changed:
            return {lane.name: asdict(lane.stats) for lane in (self._down, self._up)}

    def close(self) -> None:
        """End the threads, once they have done what is queued."""
        self._wake = _nobody
        self._down.close()
        self._up.close()

    # -- on any thread ------------------------------------------------------------------------------------------------

    def _ended(self, shipment: Shipment, result: object, error: Exception | None) -> None:
        """A lane did what it had to do for a shipment."""
        if error is None and result is not None:
            self._tell([], [(shipment, result)])
            return
        if error is not None:
            log.warning(
                "%d pages of %s were not copied (%s): %r", shipment.pages, shipment.pool, shipment.lane.name, error
            )
        with self._changed:
            stats = shipment.lane.stats
            stats.queued_bytes -= shipment.nbytes
            self._under_way -= 1
            self._targets.pop(shipment, None)
            if error is not None:
                stats.failed_pages += shipment.pages
            else:
                stats.moves += len(shipment.moves)
                stats.pages += shipment.pages
                stats.bytes += shipment.nbytes
            self._tell([Done(move) if error is None else Failed(move) for move in shipment.moves])

    def _tell(self, events: Sequence[Event], fetched: Sequence[tuple[Shipment, Fetched]] = ()) -> None:
        """There is news; whoever runs the steps is woken if nobody has done so since it last asked."""
        with self._changed:
            first = not (self._news or self._fetched)
            self._news += events
            self._fetched += fetched
            self._changed.notify_all()
        if first:
            self._wake()


def _numbers(slots: Iterable[Rows]) -> PageNumbers:
    return np.concatenate([np.asarray(some, np.int32) for some in slots])


def _nobody() -> None:
    """Nobody listens."""
