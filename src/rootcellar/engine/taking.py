"""A decode node: the pages of a prompt that another node computes come to host memory while its request waits.

What the prefill node will have is known from the prompt, so the cache is told of all of it at once, as it is told of
what a store has; the copies of it are planned, and each is done when its pages have been computed, and have come. The
request holds no row and no memory of the device meanwhile, and goes on like any whose prompt is on the host. What did
not come is computed, or the request ends with the reason (``disaggregation_fallback``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from rootcellar.cache import Key, Lost, Prefetch, Question, Tier
from rootcellar.engine.apart import End, PeerEvent, Peers
from rootcellar.errors import RequestError
from rootcellar.scheduler import Finish, Request, Scheduler, Stage
from rootcellar.transfer.receiver import Parted, Receiver, Welcomed

PIECE = 16
"""Pages that come as one: as fewer may be used when the others do not come."""
_ROUNDS = 3
"""How often the prefill node is asked for what others were to bring and did not, or did not stay."""


@dataclass(slots=True)
class _Awaited:
    """A request that waits for its prompt. ``why``: nothing more will come, and why; ``rounds``: times it was asked."""

    request: Request
    visit: int
    since: float
    welcomed: bool = False
    prefetch: Prefetch | None = None
    why: str | None = None
    rounds: int = 0

    @property
    def target(self) -> Key:
        """What is to be there."""
        return self.request.key(self.request.matchable)


class Taking(Peers):
    """See ``Peers``."""

    def __init__(
        self,
        scheduler: Scheduler,
        receiver: Receiver,
        names_of: Callable[[Key], Sequence[bytes]],
        end: End,
        patience: float,
        *,
        recompute: bool,
    ) -> None:
        """``patience``: seconds that a request waits for its prompt. ``recompute``: compute what does not come."""
        self._scheduler, self._receiver, self._names_of = scheduler, receiver, names_of
        self._end, self._patience, self._recompute = end, patience, recompute
        self._wishes: dict[int, _Awaited] = {}
        """By the visit of each."""

    def require(self, requests: Sequence[Request]) -> None:
        """See ``Peers``."""
        if any(request.room is not None and not request.room.host for request in requests):
            raise RequestError("bootstrap_room needs bootstrap_host on a decode node: where the prefill node is")

    def arrived(self, request: Request, now: float) -> None:
        """See ``Peers``."""
        if request.room is None:
            return
        cache = self._scheduler.cache
        key = request.key(request.matchable)
        question = cache.ask(key, Tier.PEER)
        names = self._names_of(request.whole)
        start = len(names) * cache.page_size if question is None else question.reach
        visit = self._receiver.join(request.room, request.epoch, names[-1].hex() if names else "", start)
        if question is None:
            self._receiver.leave(visit, satisfied=True)
            _transferred(request)
        else:
            self._wishes[visit] = _Awaited(request, visit, now)
            self._scheduler.hold(request)

    def ended(self, request: Request) -> None:
        """See ``Peers``."""
        for wish in [wish for wish in self._wishes.values() if wish.request is request]:
            self._forget(wish, satisfied=False)

    def desert(self, rooms: Set[int], why: str) -> int:
        """See ``Peers``."""
        found = [
            wish
            for wish in self._wishes.values()
            if wish.request.room is not None and wish.request.room.number in rooms
        ]
        for wish in found:
            self._give_up(wish, why)
        return len(found)

    def take(self) -> Sequence[PeerEvent]:
        """See ``Peers``."""
        return self._receiver.take()

    def meet(self, events: Sequence[PeerEvent], now: float) -> None:  # noqa: ARG002
        """See ``Peers``."""
        for event in events:
            match event:
                case Welcomed(visit):
                    if (wish := self._wishes.get(visit)) is not None:
                        wish.welcomed = True
                        wish.request.enter(Stage.DECODE_WAITING)
                case Parted(visit, why):
                    if (wish := self._wishes.get(visit)) is not None:
                        wish.why = why
        self.learned()

    def learned(self) -> None:
        """See ``Peers``."""
        for wish in list(self._wishes.values()):
            if wish.welcomed or wish.why is not None:  # else nothing can have come
                self._go_on(wish)

    def _go_on(self, wish: _Awaited) -> None:
        """See what can be done for a request that waits."""
        cache = self._scheduler.cache
        if wish.prefetch is not None:
            if cache.pending(wish.prefetch):
                return
            wish.prefetch = None
        if cache.match(wish.target).reach(Tier.HOST) >= len(wish.target) // cache.page_size * cache.page_size:
            self._arrive(wish)
        elif wish.why is not None:
            self._give_up(wish, wish.why)
        elif wish.welcomed and wish.rounds >= _ROUNDS:
            self._arrive(wish)  # it is computed, as far as it is not there: the prefill node does not have it any more
        elif wish.welcomed:
            self._ask(wish)

    def _ask(self, wish: _Awaited) -> None:
        """Have what is lacking brought to the host, when there is room for it."""
        cache = self._scheduler.cache
        question = cache.ask(wish.target, Tier.PEER)
        if question is not None:
            if not self._room_for(question):
                return
            self._receiver.promised(wish.visit, question.pages)
            self._scheduler.learn(question.answer([True] * len(question.pages), PIECE))
        wish.rounds += 1
        wish.prefetch = cache.prefetch(cache.match(wish.target), Tier.PEER)
        if wish.prefetch is None or not cache.pending(wish.prefetch):
            self._arrive(wish)  # no copy could be planned: nothing would tell of one

    def _room_for(self, question: Question) -> bool:
        """Whether the host has room for what a question asks for; where nobody else's is on its way, there will be no
        more of it than there is.
        """
        if not any(wish.prefetch is not None for wish in self._wishes.values()):
            return True
        cache = self._scheduler.cache
        shelves, size, total = cache.stats().shelves, cache.page_size, len(question.key)
        for kind, first in zip(question.kinds, question.firsts, strict=True):
            shelf = shelves[kind.name, Tier.HOST]
            begin = max(kind.start(total), first * size)
            needed = 1 if kind.rule == "recurrent" else total - begin
            if needed > shelf.free + shelf.evictable:
                return False
        return True

    def _arrive(self, wish: _Awaited) -> None:
        """What was to come has come."""
        self._forget(wish, satisfied=True)
        _transferred(wish.request)
        self._scheduler.hold(wish.request, False)

    def _give_up(self, wish: _Awaited, why: str) -> None:
        """Nothing more will come."""
        self._forget(wish, satisfied=False)
        if self._recompute:
            wish.request.enter(Stage.PREFILL_WAITING)
            self._scheduler.hold(wish.request, False)
        else:
            self._end(wish.request, Finish.abort("failed", why))

    def _forget(self, wish: _Awaited, *, satisfied: bool) -> None:
        del self._wishes[wish.visit]
        self._receiver.leave(wish.visit, satisfied=satisfied)
        self._scheduler.learn([Lost(wish.target, Tier.PEER)])  # whoever else wants it asks for itself

    def expire(self, now: float) -> None:
        """See ``Peers``."""
        for wish in list(self._wishes.values()):
            if now >= wish.since + self._patience:
                self._give_up(
                    wish,
                    f"its prompt's KV cache did not come within {self._patience:g} s (disaggregation_waiting_timeout)",
                )

    @property
    def next_end(self) -> float | None:
        """See ``Peers``."""
        return min((wish.since + self._patience for wish in self._wishes.values()), default=None)

    @property
    def meeting(self) -> int:
        """See ``Peers``."""
        return len(self._wishes)

    def listen(self, wake: Callable[[], None]) -> None:
        """See ``Peers``."""
        self._receiver.listen(wake)

    def stats(self) -> dict[str, object]:
        """See ``Peers``."""
        return {"waiting": len(self._wishes), **asdict(self._receiver.stats)}

    def copies(self) -> dict[str, dict[str, Any]]:
        """See ``Peers``."""
        stats = asdict(self._receiver.stats)
        return {"peer-host": {name: stats[name] for name in ("moves", "pages", "bytes", "seconds", "failed_pages")}}


def _transferred(request: Request) -> None:
    if request.stage is Stage.DECODE_BOOTSTRAP:
        request.enter(Stage.DECODE_WAITING)
    request.enter(Stage.DECODE_TRANSFERRED)
