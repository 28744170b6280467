"""A prefill node: prompts are computed for decode nodes, and offered to them as each chunk is committed.

A request waits in its room until a decode node comes (PREFILL_BOOTSTRAP), is computed like any other, and stays until
that has what it needs (PREFILL_TRANSFER_KV_CACHE). What was offered stays on the device until it arrived; whoever goes
away lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from rootcellar.cache import Done, Failed, Key
from rootcellar.engine.apart import Admit, End, PeerEvent, Peers
from rootcellar.errors import RequestError
from rootcellar.scheduler import Finish, Request, Scheduler, Stage
from rootcellar.transfer.sender import Arrived, Joined, Left, Satisfied, Sender, SentAway
from rootcellar.transfer.talk import Patience


@dataclass(slots=True)
class _Guest:
    """The request of a room. ``reached``: tokens up to which the decode node was offered all; None: nobody came.

    ``until``: when that is too late, and ``why`` it is given up then.
    """

    request: Request
    until: float
    why: str
    reached: int | None = None
    complete: bool = False


class Giving(Peers):
    """See ``Peers``."""

    def __init__(
        self,
        scheduler: Scheduler,
        sender: Sender,
        names_of: Callable[[Key], Sequence[bytes]],
        end: End,
        admit: Admit,
        patience: Patience,
    ) -> None:
        """``names_of``: the digests of a key's whole pages.

        ``patience``: how long a request waits in its room (``meeting``), and once somebody came who does not fit, for
        one who does (``silence``).
        """
        self._scheduler, self._sender, self._names_of = scheduler, sender, names_of
        self._end, self._admit, self._patience = end, admit, patience
        self._guests: dict[int, _Guest] = {}

    def require(self, requests: Sequence[Request]) -> None:
        """See ``Peers``."""
        rooms = [request.room.number for request in requests if request.room is not None]
        taken = next((room for i, room in enumerate(rooms) if room in self._guests or room in rooms[:i]), None)
        if taken is not None:
            raise RequestError(f"bootstrap_room {taken} is in use: give each request a room of its own")

    def arrived(self, request: Request, now: float) -> None:
        """See ``Peers``."""
        if request.room is None:
            return
        names = self._names_of(request.whole)
        wait = self._patience.meeting
        why = f"no decode node came for it within {wait:g} s (disaggregation_waiting_timeout)"
        self._guests[request.room.number] = _Guest(request, now + wait, why)
        self._scheduler.hold(request)
        self._sender.expect(request.room.number, request.epoch, names[-1].hex() if names else "")

    def ended(self, request: Request) -> None:
        """See ``Peers``."""
        if request.room is None or self._guests.pop(request.room.number, None) is None:
            return
        finish = request.finish
        why = None if finish is None or finish.type != "abort" else f"the prefill node gave it up: {finish.message}"
        held = self._sender.end(request.room.number, why)
        self._scheduler.learn([Failed(manifest) for manifest in held])

    def desert(self, rooms: Set[int], why: str) -> int:
        """See ``Peers``."""
        found = [guest.request for room, guest in self._guests.items() if room in rooms]
        for request in found:
            self._end(request, Finish.abort("gone", why))
        return len(found)

    def take(self) -> Sequence[PeerEvent]:
        """See ``Peers``."""
        events = self._sender.take()
        self._sender.pump()
        return events

    def meet(self, events: Sequence[PeerEvent], now: float) -> None:
        """See ``Peers``."""
        for event in events:
            match event:
                case Joined(room, start):
                    if (guest := self._guests.get(room)) is not None:
                        guest.reached = start
                        guest.request.enter(Stage.PREFILL_WAITING)
                        self._scheduler.hold(guest.request, False)
                        self._admit(guest.request, now)
                case Arrived(_, manifests):
                    self._scheduler.learn([Done(manifest) for manifest in manifests])
                case Satisfied(room):
                    if (guest := self._guests.get(room)) is not None:
                        self._end(guest.request, Finish("length"))
                case SentAway(room, why):
                    if (guest := self._guests.get(room)) is not None:
                        guest.until = min(guest.until, now + self._patience.silence)
                        guest.why = f"no decode node that fits came for it; the last one was refused: {why}"
                case Left(room, why):
                    if (guest := self._guests.get(room)) is not None:
                        self._end(guest.request, Finish.abort("gone", why))

    def dispatch(self) -> None:
        """See ``Peers``."""
        for room, guest in self._guests.items():
            request = guest.request
            if guest.reached is None or guest.complete:
                continue
            complete = request in self._scheduler.giving
            key = request.whole if complete else request.key(min(request.committed, request.prompt_length - 1))
            if len(key) > guest.reached:
                manifest = self._scheduler.cache.send(key, guest.reached)
                if manifest is not None:
                    guest.reached = manifest.tokens
                    self._sender.offer(room, manifest)
            if complete:
                guest.complete = True
                self._sender.computed(room)
        self._sender.pump()

    def forget_device(self) -> None:
        """See ``Peers``: what was offered is no more."""
        for guest in list(self._guests.values()):
            if guest.reached is not None:
                self._end(guest.request, Finish.abort("failed", "what was offered of it on the device was lost"))

    def expire(self, now: float) -> None:
        """See ``Peers``."""
        for guest in list(self._guests.values()):
            if guest.reached is None and now >= guest.until:
                self._end(guest.request, Finish.abort("timeout", guest.why))

    @property
    def next_end(self) -> float | None:
        """See ``Peers``."""
        return min((guest.until for guest in self._guests.values() if guest.reached is None), default=None)

    @property
    def meeting(self) -> int:
        """See ``Peers``."""
        come = sum(guest.reached is None for guest in self._guests.values())
        return come + len(self._scheduler.giving)

    def listen(self, wake: Callable[[], None]) -> None:
        """See ``Peers``."""
        self._sender.listen(wake)

    def stats(self) -> dict[str, object]:
        """See ``Peers``."""
        return {"open_rooms": len(self._guests), **asdict(self._sender.stats)}

    def copies(self) -> dict[str, dict[str, Any]]:
        """See ``Peers``."""
        stats = self._sender.stats
        counts = {"pages": stats.pages, "bytes": stats.bytes, "seconds": stats.seconds}
        return {"device-peer": {**counts, "failed_pages": stats.missing_pages, "queued_bytes": self._sender.queued}}
