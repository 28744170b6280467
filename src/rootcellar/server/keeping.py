"""Prompts that are kept in the cache for a time because a request said so, and the next one of its conversation may.

Pins count in full, and a conversation pins more of itself each turn: what the longer pin covers is let go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rootcellar.engine.prefixes import Prefixes
from rootcellar.errors import RequestTooLarge

_MOST = 1024
Namespace = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)  # one is itself: arrays do not say whether they are equal
class _Pinned:
    where: Namespace
    ids: NDArray[np.int32]
    ends: float


class Keeper:
    """The pins that requests of one server have made. For its event loop."""

    def __init__(self, prefixes: Prefixes, now: Callable[[], float] = time.monotonic) -> None:
        """Pin by ``prefixes``; ``now`` gives seconds."""
        self._prefixes = prefixes
        self._now = now
        self._kept: list[_Pinned] = []

    async def keep(self, ids: Sequence[int], seconds: float, where: Mapping[str, str], share: float) -> int:
        """Keep what is cached of ``ids`` for so long; how many tokens that is, 0 where there is no room for them.

        ``where``: ``tenant``, ``cache_salt`` and ``extra_key``; ``share``: the tenant's of what pins may hold.
        """
        name = tuple(sorted(where.items()))
        new = np.asarray(ids, np.int32)
        now = self._now()
        self._kept = [each for each in self._kept if each.ends > now]
        covered = [each for each in self._kept if each.where == name and _begins(new, each.ids)]
        # One that is to last longer than the new one stays beside it.
        covered = [each for each in covered if each.ends <= now + seconds]
        for each in covered:
            await asyncio.to_thread(self._prefixes.unpin, each.ids, **where)
        try:
            done = await asyncio.to_thread(self._prefixes.pin, new, seconds, **where, share=share)
        except RequestTooLarge:
            for each in covered:
                await asyncio.to_thread(self._prefixes.pin, each.ids, each.ends - now, **where, share=share)
            return 0
        self._kept = [each for each in self._kept if each not in covered]
        tokens = int(done["pinned_tokens"])
        if tokens:
            self._kept = [*self._kept, _Pinned(name, new, now + seconds)][-_MOST:]
        return tokens


def _begins(ids: NDArray[np.int32], start: NDArray[np.int32]) -> bool:
    return len(start) <= len(ids) and bool(np.array_equal(ids[: len(start)], start))
