"""Several stores in a row, as one: pages are read from the first that has them, and written to all.

Settings: ``stores``, a list of two or more, each an object of ``backend``, ``deadline`` and the settings of that
backend. What a farther store had is put into those before it, and each has a guard of its own: one that fails or hangs
is left alone, and the others serve. All of them together have the chain's ``deadline``, and each an equal part of it
unless it has one of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rootcellar.errors import ConfigError
from rootcellar.tiers.guard import Guard, GuardSettings
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import nothing_else
from rootcellar.tiers.store import TimedStore, check_names
from rootcellar.tiers.stores import registry


def open_store(extra: Mapping[str, object], identity: str) -> StoreChain:
    """See ``registry``."""
    own = dict(extra)
    members = own.pop("stores", None)
    deadline = positive(own, "deadline", GuardSettings().deadline)
    nothing_else(own, "chain", "stores")
    if not isinstance(members, list) or len(members) < 2 or not all(isinstance(one, Mapping) for one in members):
        raise ConfigError('stores is not allowed: give a list of two or more, as {"backend": "file", "path": ...}')
    opened: list[Guard] = []
    try:
        for one in members:
            rest = {"deadline": deadline / len(members)} | {str(name): value for name, value in one.items()}
            opened.append(registry.open_store(str(rest.pop("backend", None)), rest, identity))
    except BaseException:
        for store in opened:
            store.close()
        raise
    return StoreChain(opened, deadline)


class StoreChain(TimedStore):
    """Stores that check what they give, the nearest first."""

    verifies = True

    def __init__(
        self,
        stores: Sequence[Guard],
        deadline: float = GuardSettings().deadline,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """In front of each other. ``deadline``: seconds that a call may take; ``now``: the clock of their guards."""
        self._stores = tuple(stores)
        self._deadline = deadline
        self._now = now

    def has(self, names: Sequence[bytes], by: float | None = None) -> list[bool]:
        """See ``Store``: whether any has them."""
        check_names(names)
        by = self._end(by)
        there = [False] * len(names)
        for store in self._stores:
            missing = [i for i, found in enumerate(there) if not found]
            if missing and self._now() < by:
                for i, found in zip(missing, store.has([names[i] for i in missing], by), strict=True):
                    there[i] = found
        return there

    def get(self, names: Sequence[bytes], into: Sequence[memoryview], by: float | None = None) -> list[bool]:
        """See ``Store``. What comes from a farther store is put into those before it, if there is time."""
        check_names(names, into)
        by = self._end(by)
        there = [False] * len(names)
        for depth, store in enumerate(self._stores):
            missing = [i for i, found in enumerate(there) if not found]
            if not missing or self._now() >= by:
                break
            found = store.get([names[i] for i in missing], [into[i] for i in missing], by)
            came = [i for i, whole in zip(missing, found, strict=True) if whole]
            for i in came:
                there[i] = True
            for nearer in self._stores[:depth]:
                if came and self._now() < by:
                    nearer.put([names[i] for i in came], [into[i] for i in came], by)
        return there

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview], by: float | None = None) -> list[bool]:
        """See ``Store``: True where any of them keeps it."""
        check_names(names, blocks)
        by = self._end(by)
        held = [False] * len(names)
        for store in self._stores:
            if self._now() < by:
                held = [a or b for a, b in zip(held, store.put(names, blocks, by), strict=True)]
        return held

    def clear(self) -> int:
        """See ``Store``: of all; the most that one had."""
        return max(store.clear() for store in self._stores)

    def register(self, buffer: memoryview) -> None:
        """See ``Store``."""
        for store in self._stores:
            store.register(buffer)

    def close(self) -> None:
        """See ``Store``."""
        for store in self._stores:
            store.close()

    def _end(self, by: float | None) -> float:
        """When a call that begins now is to end."""
        end = self._now() + self._deadline
        return end if by is None else min(end, by)
