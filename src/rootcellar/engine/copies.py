"""Copies between tiers, as the engine sees them: who carries them out, and how to wait for all of them.

Everything here runs on the engine's thread between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rootcellar.cache import Done, Event, Failed, Move, Tier
from rootcellar.scheduler import Scheduler


class AnyMover(Protocol):
    """Carries out the copies that the cache decides on."""

    def dispatch(self, moves: Sequence[Move], *, patient: bool = False) -> None:
        """Begin these copies, in order. A source on the device is read before the next step runs.

        What finds a queue too long is reported ``Failed``, unless ``patient``: then it is waited for.
        """

    def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, on any thread, when there is something to report that nobody was told of."""

    def reports(self) -> list[Event]:
        """What was seen since the last call, without waiting."""

    def drain(self) -> list[Event]:
        """Wait for all that is under way, then :meth:`reports`."""


def settle(scheduler: Scheduler, mover: AnyMover | None) -> None:
    """Wait until no copy is planned or under way."""
    if mover is None:
        return
    busy = True
    while busy:
        moves = scheduler.cache.moves()
        mover.dispatch(moves, patient=True)
        events = mover.drain()
        scheduler.learn(events)
        busy = bool(moves or events)


def forget_device(scheduler: Scheduler, mover: AnyMover | None) -> None:
    """Forget what lies on the device, and nothing else: its bytes are lost. Copies that are under way end first."""
    cache = scheduler.cache
    busy = True
    while busy:
        moves = cache.moves()
        for move in moves:
            if move.dst is Tier.DEVICE:
                cache.learn(Done(move.id))  # forgotten below; a failure would speak against its source
            elif move.src is Tier.DEVICE or mover is None:
                cache.learn(Failed(move.id))
            else:
                mover.dispatch([move])
        events = [] if mover is None else mover.drain()
        for event in events:
            cache.learn(event)
        busy = bool(moves or events)
    cache.forget_tier(Tier.DEVICE)
