"""Copies between tiers, as the engine sees them: who carries them out, and how to wait for all of them.

Everything here runs on the engine's thread between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rootcellar.cache import Done, Failed, Move, Question, Reports, Tier
from rootcellar.scheduler import Scheduler
from rootcellar.tiers.store import Store


class AnyMover(Protocol):
    """Carries out the copies that the cache decides on."""

    def dispatch(self, moves: Sequence[Move], *, patient: bool = False) -> None:
        """Begin these copies, in order. A source on the device is read before the next step runs.

        What finds a queue too long is reported ``Failed``, unless ``patient``: then it is waited for.
        """

    def ask(self, serial: int, question: Question) -> None:
        """Ask the store. Its answer comes in a later report, exactly one whatever happens."""

    def attach(self, store: Store) -> None:
        """Move pages to and from ``store``. ``ValueError``: there is one, perhaps one that is leaving."""

    def leave(self) -> None:
        """From now on what is to go to the store or come from it fails at once, and questions find nothing."""

    def await_left(self, deadline: float) -> int:
        """On any thread, wait until nothing of a store that leaves is under way; then give up what was not begun.

        Returns how many pages are inside a call that has not returned; 0: the store is free.
        """

    def detach(self) -> Store | None:
        """The store that has left, to be closed by the caller; None: there was none. ``ValueError``: it is in use."""

    def stats(self) -> dict[str, dict[str, Any]]:
        """What each lane did, by its name, and what became of the calls of a guarded ``store``."""

    def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, on any thread, when there is something to report that nobody was told of."""

    def reports(self) -> Reports:
        """What was seen since the last call, without waiting."""

    def drain(self, *, near: bool = False) -> Reports:
        """Wait for all that is under way, questions too, then :meth:`reports`; ``near``: for what touches the device.

        A store that does nothing for a long time is not waited for any longer.
        """


def settle(scheduler: Scheduler, mover: AnyMover | None) -> Reports:
    """Wait until no copy is planned or under way, or a store hangs.

    Returns what was seen meanwhile. The copies are learned; who waits for them, and for answers, has yet to be told.
    """
    seen = Reports()
    busy = mover is not None
    while busy:
        assert mover is not None
        moves = scheduler.cache.moves()
        mover.dispatch(moves, patient=True)
        reports = mover.drain()
        scheduler.learn(reports.events)
        seen += reports
        busy = bool(moves or reports.events)
    return seen


def forget_device(scheduler: Scheduler, mover: AnyMover | None) -> Reports:
    """Forget what lies on the device, and nothing else: its bytes are lost. Copies from and to it end first.

    Returns what was seen meanwhile, as :func:`settle` does.
    """
    cache = scheduler.cache
    seen = Reports()
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
        reports = Reports() if mover is None else mover.drain(near=True)
        for event in reports.events:
            cache.learn(event)
        seen += reports
        busy = bool(moves or reports.events)
    cache.forget_tier(Tier.DEVICE)
    return seen
