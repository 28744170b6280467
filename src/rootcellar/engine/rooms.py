"""The rooms in which an engine's requests meet those of other nodes, for whoever sends those there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from rootcellar.engine.commands import Desert
from rootcellar.engine.loop import Loop


class Rooms:
    """Those of one engine; for any thread."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def lost(self, rooms: Sequence[int], why: str) -> Future[int]:
        """Nobody will come to these rooms; how many requests waited in them."""
        return self._loop.post(Desert(frozenset(rooms), why))
