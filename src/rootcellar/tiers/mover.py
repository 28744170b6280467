"""Carries out the copies that the cache decides on, between the device, host memory and a store.

The thread that runs the steps hands over ``cache.moves()`` before each of them, and takes the reports between them.
Bytes are copied on the lanes' threads (``lane.py``); what has to be in order with steps, reading the device and writing
it, is begun by the thread of the steps. Nothing here waits for a copy but ``drain``: what would make a lane too long is
skipped, reported ``Failed`` and counted. A store (``storage.py``) comes and goes meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from rootcellar.cache import Answer, Done, Failed, Move, Question, Reports, Tier
from rootcellar.pools.copying import Copier, Fetched, PageNumbers
from rootcellar.pools.images import Images, Rows
from rootcellar.tiers.guard import Guard
from rootcellar.tiers.lane import Lane, LaneStats, Shipment
from rootcellar.tiers.news import News
from rootcellar.tiers.storage import STALLED, Storage
from rootcellar.tiers.store import Store

log = logging.getLogger(__name__)

MOST_QUEUED = 256 * 2**20
"""Bytes that wait to be written down at most, or what one node has; gathered, they lie in the device's memory.

As many wait to be written into a store, or half of host memory, if that is less: the other half can still be had.
"""
TOGETHER = 64
"""Pages that are copied at once, or those of one move if they are more."""
PATIENCE = 10.0
"""Seconds for which :meth:`Mover.close` waits for a store."""


class Mover:
    """Moves pages between the device's pools, images in host memory and a store."""

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
        self._news = News()
        self._storage: Storage | None = None
        self._stored = {"host-storage": LaneStats(), "storage-host": LaneStats()}
        """Of all stores that were there."""
        self._peers: Callable[[Sequence[Move]], None] | None = None

    def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, on any thread, when there is something to report that nobody was told of."""
        self._news.listen(wake)

    # -- on the thread that runs the steps --------------------------------------------------------------------------

    def dispatch(self, moves: Sequence[Move], *, patient: bool = False) -> None:
        """Begin these copies. Sources on the device are read, and pages there written, before the next step runs.

        ``patient``: wait for room instead of skipping anything.
        """
        down = [move for move in moves if (move.src, move.dst) == (Tier.DEVICE, Tier.HOST)]
        up = [move for move in moves if (move.src, move.dst) == (Tier.HOST, Tier.DEVICE)]
        write = [move for move in moves if (move.src, move.dst) == (Tier.HOST, Tier.STORAGE)]
        read = [move for move in moves if (move.src, move.dst) == (Tier.STORAGE, Tier.HOST)]
        take = [move for move in moves if (move.src, move.dst) == (Tier.PEER, Tier.HOST)]
        known = len(down) + len(up) + len(write) + len(read) + len(take)
        assert known == len(moves), "the cache was given no other tier"
        # What reads the device comes first: a page may be left by one move and written by another.
        for pool, some in self._together(down):
            self._read(pool, some, patient)
        for pool, some in self._together(up):
            self._load(pool, some)
        if self._storage is not None:
            self._storage.read(read)
            self._storage.write(write, patient)
        elif write or read:
            for lane, some in zip(self._stored.values(), (write, read), strict=True):
                lane.skipped_pages += sum(len(move.src_slots) for move in some)
            self._news.tell([Failed(move.id) for move in (*write, *read)])
        if take:
            assert self._peers is not None, "the cache knows of pages of peers from them alone"
            self._peers(take)

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
        pages, rows = _numbers(m.src_slots for m in moves), _numbers(m.dst_slots for m in moves) - 1
        if not self._room_for(shipment, patient):
            self._down.stats.skipped_pages += shipment.pages
            self._news.tell([Failed(move) for move in shipment.moves])
            if self._device[pool].image.together:  # other processes have room, and cannot do it without this one
                self._device[pool].read(pages, self._host[pool], rows)
            return
        self._begin(shipment, lambda: self._device[pool].read(pages, self._host[pool], rows), self._down.put)

    def _room_for(self, shipment: Shipment, patient: bool) -> bool:
        """Whether a shipment may be queued; ``patient``: it may, sooner or later."""
        stats = shipment.lane.stats
        with self._news.changed:
            while stats.queued_bytes and stats.queued_bytes + shipment.nbytes > self._most_queued:
                if not patient:
                    return False
                self._news.changed.wait()
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
        with self._news.changed:
            if not again:
                self._news.under_way += 1
                shipment.lane.stats.queued_bytes += shipment.nbytes
        try:
            rest = begin()
        except Exception as error:
            self._ended(shipment, None, error)
        else:
            put(shipment, rest)

    def take_from(self, peers: Callable[[Sequence[Move]], None]) -> News:
        """Have ``peers`` begin what comes from other nodes. Returns what is to be told what became of it."""
        self._peers = peers
        return self._news

    # -- a store ------------------------------------------------------------------------------------------------------

    def attach(self, store: Store, most_queued: int | None = None) -> None:
        """Move pages to and from ``store``, and ask it. At most so many bytes wait to be written: see ``MOST_QUEUED``.

        Raises ``ValueError``: there is a store, which must leave and be detached before.
        """
        if self._storage is not None:
            raise ValueError(f"a store {'is leaving' if self._storage.leaving else 'is attached'}: detach it first")
        writes, reads = self._stored.values()
        if most_queued is None:
            most_queued = min(MOST_QUEUED, sum(images.nbytes for images in self._host.values()) // 2)
        self._storage = Storage(store, self._host, self._pool_of, self._news, writes, reads, most_queued)

    def leave(self) -> None:
        """From now on what is to go to the store or come from it fails at once, and questions find nothing.

        What is under way goes on. For any thread.
        """
        if self._storage is not None:
            self._storage.leave()

    def await_left(self, deadline: float) -> int:
        """After :meth:`leave`: wait, on any thread, until nothing of the store is under way.

        After ``deadline`` seconds what waits in line fails, and who drains no longer waits for what the store does.
        Returns how many pages are inside a call of the store that has not returned; they are reported once it does.
        0: the store is free. Raises ``ValueError``: the store was not told to leave.
        """
        storage = self._storage
        if storage is None:
            return 0
        if not storage.leaving:
            raise ValueError("the store was not told to leave")
        return storage.await_left(deadline)

    def detach(self) -> Store | None:
        """The store that has left, for its caller to close; None: there was none.

        Raises ``ValueError``: something of it is under way, see :meth:`await_left`.
        """
        storage = self._storage
        if storage is None:
            return None
        if not storage.leaving or storage.busy:
            raise ValueError("the store is in use: let it leave, and wait until it has")
        storage.close()
        self._storage = None
        return storage.store

    def ask(self, serial: int, question: Question) -> None:
        """Ask the store. Its answer comes in a later report, exactly one; without a store it has nothing in it."""
        if self._storage is None:
            self._news.tell(answers=[Answer(serial, ())])
        else:
            self._storage.ask(serial, question)

    # -- what came of it ----------------------------------------------------------------------------------------------

    def reports(self) -> Reports:
        """What became of copies and questions since the last call, without waiting.

        Writes to the device what was fetched for it.
        """
        reports, fetched = self._news.take()
        for shipment, images in fetched:
            self._begin(shipment, partial(self._write, shipment, images), self._up.put, again=True)
        return reports

    def drain(self, *, near: bool = False) -> Reports:
        """Wait for all that is under way, then :meth:`reports`; ``near``: for what touches the device.

        Not for a store beyond :meth:`await_left`, or one of which nothing was heard for ``STALLED`` seconds.
        """
        seen = self.reports()
        while True:
            with self._news.changed:
                far = 0 if self._storage is None else self._storage.under_way
                alone = self._news.under_way == far
            heard = self._news.wait((0.0 if near else STALLED) if alone else None)
            seen += self.reports()
            if not heard:
                return seen

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each lane, by its name, what it did: see ``LaneStats``. Of a guarded store, ``store`` and ``breaker``: see
        ``Guard``.
        """
        with self._news.changed:
            lanes = {lane.name: lane.stats for lane in (self._down, self._up)} | self._stored
            found = {name: asdict(stats) for name, stats in lanes.items()}
        storage = self._storage
        if storage is not None and isinstance(storage.store, Guard):
            found["store"] = {verb: asdict(stats) for verb, stats in storage.store.stats().items()}
            found["breaker"] = asdict(storage.store.breaker())
        return found

    def close(self) -> Store | None:
        """End the threads, once they have done what is queued. A store gets ``PATIENCE`` seconds.

        Returns it, for its caller to close, if it is free by then.
        """
        self._news.listen(None)
        self._down.close()
        self._up.close()
        if self._storage is not None:
            self._storage.leave()
            inside = self._storage.await_left(PATIENCE)
            self._storage.close()
            return None if inside else self._storage.store
        return None

    # -- on any thread ------------------------------------------------------------------------------------------------

    def _ended(self, shipment: Shipment, result: object, error: Exception | None) -> None:
        """A lane did what it had to do for a shipment."""
        if error is None and result is not None:
            self._news.tell(fetched=[(shipment, result)])
            return
        if error is not None:
            log.warning(
                "%d pages of %s were not copied (%s): %r", shipment.pages, shipment.pool, shipment.lane.name, error
            )
        with self._news.changed:
            stats = shipment.lane.stats
            stats.queued_bytes -= shipment.nbytes
            self._targets.pop(shipment, None)
            if error is not None:
                stats.failed_pages += shipment.pages
            else:
                stats.moves += len(shipment.moves)
                stats.pages += shipment.pages
                stats.bytes += shipment.nbytes
            self._news.tell([Done(move) if error is None else Failed(move) for move in shipment.moves], ended=1)


def _numbers(slots: Iterable[Rows]) -> PageNumbers:
    return np.concatenate([np.asarray(some, np.int32) for some in slots])
