"""Prefill and decode apart: what an engine has to do with other nodes, as its machine sees it.

``giving.py`` is the prefill node's side of it, ``taking.py`` the decode node's. All of it runs on the engine's thread
between two steps; what threads of ``transfer/`` saw comes as a command (``Meet``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

from rootcellar.errors import RequestError
from rootcellar.scheduler import Finish, Request
from rootcellar.transfer.receiver import ReceiverEvent
from rootcellar.transfer.sender import SenderEvent

PeerEvent = SenderEvent | ReceiverEvent
End = Callable[[Request, Finish], None]
"""Ends a request and tells its caller."""
Admit = Callable[[Request, float], None]
"""A request waits from a moment on for nobody but those of this engine."""


class Peers:
    """What other nodes have to do with an engine's requests; as it stands, of an engine that has to do with none."""

    def require(self, requests: Sequence[Request]) -> None:
        """Raise ``RequestError`` where these could not meet what they want to; nothing was changed."""
        if any(request.room is not None for request in requests):
            raise RequestError(
                "bootstrap_room is for a node of its own for prefill or decode: start with disaggregation_mode"
            )

    def arrived(self, request: Request, now: float) -> None:
        """A request waits from ``now`` on."""

    def ended(self, request: Request) -> None:
        """A request ended."""

    def desert(self, rooms: Set[int], why: str) -> int:  # noqa: ARG002
        """Nobody will come to any of these rooms; how many requests waited there."""
        return 0

    def take(self) -> Sequence[PeerEvent]:
        """What happened since the last call."""
        return ()

    def meet(self, events: Sequence[PeerEvent], now: float) -> None:
        """Take in what happened by ``now``."""

    def learned(self) -> None:
        """The cache learned of copies."""

    def dispatch(self) -> None:
        """Before a step: give what can be given."""

    def forget_device(self) -> None:
        """What is on the device is about to be lost."""

    def expire(self, now: float) -> None:
        """End what is late at ``now``."""

    @property
    def next_end(self) -> float | None:
        """When something will be late; None: never."""
        return None

    @property
    def meeting(self) -> int:
        """Requests that wait for another node, not for this one."""
        return 0

    def listen(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, on any thread, when there is something to take or to give."""

    def stats(self) -> dict[str, object]:
        """What was given and taken."""
        return {}

    def copies(self) -> dict[str, dict[str, Any]]:
        """The same as a lane of the mover, by its name."""
        return {}
