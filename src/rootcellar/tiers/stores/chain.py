"""Several stores in a row, as one: pages are read from the first that has them, and written to all.

Settings: ``stores``, a list of two or more, each an object of ``backend``, ``deadline`` and the settings of that
backend. What a farther store had is put into those before it, and each has a guard of its own: one that fails or hangs
is left alone, and the others serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rootcellar.errors import ConfigError
from rootcellar.tiers.guard import Guard
from rootcellar.tiers.settings import nothing_else
from rootcellar.tiers.store import Store, check_names
from rootcellar.tiers.stores import registry


def open_store(extra: Mapping[str, object], identity: str) -> StoreChain:
    """See ``registry``."""
    own = dict(extra)
    members = own.pop("stores", None)
    nothing_else(own, "chain", "stores")
    if not isinstance(members, list) or len(members) < 2 or not all(isinstance(one, Mapping) for one in members):
        raise ConfigError('stores is not allowed: give a list of two or more, as {"backend": "file", "path": ...}')
    opened: list[Guard] = []
    try:
        for one in members:
            rest = {str(name): value for name, value in one.items() if name != "backend"}
            opened.append(registry.open_store(str(one.get("backend")), rest, identity))
    except BaseException:
        for store in opened:
            store.close()
        raise
    return StoreChain(opened)


class StoreChain:
    """Stores that check what they give, the nearest first."""

    verifies = True

    def __init__(self, stores: Sequence[Store]) -> None:
        """In front of each other. Raises ``ValueError`` for one that does not verify."""
        if not all(store.verifies for store in stores):
            raise ValueError("a store of a chain does not check what it gives: guard it")
        self._stores = tuple(stores)

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``: whether any has them."""
        check_names(names)
        there = [False] * len(names)
        for store in self._stores:
            missing = [i for i, found in enumerate(there) if not found]
            if missing:
                for i, found in zip(missing, store.has([names[i] for i in missing]), strict=True):
                    there[i] = found
        return there

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. What comes from a farther store is put into those before it."""
        check_names(names, into)
        there = [False] * len(names)
        for depth, store in enumerate(self._stores):
            missing = [i for i, found in enumerate(there) if not found]
            if not missing:
                break
            found = store.get([names[i] for i in missing], [into[i] for i in missing])
            came = [i for i, whole in zip(missing, found, strict=True) if whole]
            for i in came:
                there[i] = True
            if came:
                for nearer in self._stores[:depth]:
                    nearer.put([names[i] for i in came], [into[i] for i in came])
        return there

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``: True where any of them keeps it."""
        check_names(names, blocks)
        held = [store.put(names, blocks) for store in self._stores]
        return [any(each) for each in zip(*held, strict=True)]

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
