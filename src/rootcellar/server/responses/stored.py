"""Responses that are kept for a time, so that others may go on from them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

# Bytes of all conversations together.
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredResponse:
    """One: its turns up to its end, and what its client was told of it, both as JSON; ``ends``: in seconds."""

    turns: bytes
    told: bytes
    ends: float

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return len(self.turns) + len(self.told)


class Responses:
    """Those of one server, each under its tenant's name and its own. The oldest make room."""

    def __init__(self, seconds: float, most: int, now: Callable[[], float] = time.monotonic) -> None:
        """Keep at most ``most``, each for ``seconds``; ``now`` gives seconds."""
        self._seconds = seconds
        self._most = most
        self._now = now
        self._kept: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._bytes = 0

    def put(self, tenant: str, id: str, turns: list[dict[str, Any]], told: dict[str, Any]) -> None:
        """Keep one."""
        self.drop(tenant, id)
        kept = StoredResponse(orjson.dumps(turns), orjson.dumps(told), self._now() + self._seconds)
        self._kept[tenant, id] = kept
        self._bytes += kept.nbytes
        while len(self._kept) > self._most or self._bytes > _MOST_BYTES:
            self.drop(*next(iter(self._kept)))

    def get(self, tenant: str, id: str) -> StoredResponse | None:
        """The one of this name; None: there is none, or not any more."""
        while self._kept and next(iter(self._kept.values())).ends <= self._now():
            self.drop(*next(iter(self._kept)))
        return self._kept.get((tenant, id))

    def drop(self, tenant: str, id: str) -> bool:
        """Forget one; whether there was one."""
        found = self._kept.pop((tenant, id), None)
        self._bytes -= 0 if found is None else found.nbytes
        return found is not None
