"""Prompts that are kept in the cache for a time because a request said so, and the next one of its conversation may.

Pins count in full, and a conversation pins more of itself each turn: what the longer pin covers is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rootcellar.engine.prefixes import Prefixes
from rootcellar.errors import EngineError, RequestTooLarge

# Of one tenant: each costs the engine a walk through the cache's tree whenever another begins or ends.
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
        """Keep what is cached of ``ids`` for so long; how many tokens that is, 0 where there is no room or no engine.

        ``where``: ``tenant``, ``cache_salt`` and ``extra_key``; ``share``: the tenant's of what pins may hold.
        """
        if not ids:
            return 0
        name, new, now = tuple(sorted(where.items())), np.asarray(ids, np.int32), self._now()
        self._kept = [each for each in self._kept if each.ends > now]
        begun = [each for each in self._kept if each.where == name and _begins(new, each.ids)]
        # Pinning the same again counts from then, which is not to be sooner than was promised.
        ends = max([now + seconds, *(each.ends for each in begun if len(each.ids) == len(new))])
        # One that is to last longer than the new one stays beside it.
        covered = [each for each in begun if each.ends <= ends]
        own = [each for each in self._kept if dict(each.where)["tenant"] == where["tenant"] and each not in covered]
        old = own[: max(0, len(own) + 1 - _MOST)]
        pinned = _Pinned(name, new, ends)
        # A client may go away meanwhile: the thread goes on, so what it may pin is known from now on.
        self._kept.append(pinned)
        try:
            tokens = await asyncio.to_thread(self._exchange, [*old, *covered], covered, pinned, now, share)
        except EngineError:  # it was shut down: an answer that is there is told all the same
            self._kept.remove(pinned)
            return 0
        gone = [*old, *covered] if tokens else [*old, pinned]
        self._kept = [each for each in self._kept if each not in gone]
        return tokens

    def _exchange(self, gone: list[_Pinned], covered: list[_Pinned], pinned: _Pinned, now: float, share: float) -> int:
        """Let go of ``gone`` and pin ``pinned``; where it has no room, ``covered`` again. On a thread."""
        for each in gone:
            self._prefixes.unpin(each.ids, **dict(each.where))
        try:
            done = self._prefixes.pin(pinned.ids, pinned.ends - now, **dict(pinned.where), share=share)
        except RequestTooLarge:
            for each in covered:
                with contextlib.suppress(RequestTooLarge):  # somebody else was faster
                    self._prefixes.pin(each.ids, each.ends - now, **dict(each.where), share=share)
            return 0
        return int(done["pinned_tokens"])


def _begins(ids: NDArray[np.int32], start: NDArray[np.int32]) -> bool:
    return len(start) <= len(ids) and bool(np.array_equal(ids[: len(start)], start))
