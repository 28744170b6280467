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
    """Those of one server, each under its tenant's name and its own.

    The oldest make room: those of the tenant that has most, so that nobody's go for what somebody else asks.
    """

    def __init__(self, seconds: float, most: int, now: Callable[[], float] = time.monotonic) -> None:
        """Keep at most ``most``, each for ``seconds``; ``now`` gives seconds."""
        self._seconds = seconds
        self._most = most
        self._now = now
        self._kept: dict[str, OrderedDict[str, StoredResponse]] = {}  # by tenant and id, the oldest first
        self._bytes: dict[str, int] = {}

    def put(self, tenant: str, id: str, turns: list[dict[str, Any]], told: dict[str, Any]) -> bool:
        """Keep one; whether it was kept: there may be no room for any, or no time."""
        self.drop(tenant, id)
        kept = StoredResponse(orjson.dumps(turns), orjson.dumps(told), self._now() + self._seconds)
        self._kept.setdefault(tenant, OrderedDict())[id] = kept
        self._bytes[tenant] = self._bytes.get(tenant, 0) + kept.nbytes
        self._expire()  # this one too, where none is kept for any time
        while (large := sum(self._bytes.values()) > _MOST_BYTES) or sum(map(len, self._kept.values())) > self._most:
            held = self._bytes if large else {name: len(own) for name, own in self._kept.items()}
            self._drop_oldest(max(held, key=held.__getitem__))
        return id in self._kept[tenant]

    def get(self, tenant: str, id: str) -> StoredResponse | None:
        """The one of this name; None: there is none, or not any more."""
        self._expire()
        return self._kept.get(tenant, {}).get(id)

    def drop(self, tenant: str, id: str) -> bool:
        """Forget one; whether there was one."""
        found = self._kept.get(tenant, {}).pop(id, None)
        if found is not None:
            self._bytes[tenant] -= found.nbytes
        return found is not None

    def _drop_oldest(self, tenant: str) -> None:
        self.drop(tenant, next(iter(self._kept[tenant])))

    def _expire(self) -> None:
        now = self._now()
        for tenant, own in self._kept.items():
            while own and next(iter(own.values())).ends <= now:
                self._drop_oldest(tenant)
