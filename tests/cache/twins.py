"""Both cores behind one set of verbs: each call goes to both, and everything they show must be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rootcellar.cache import Hit, Key, Lease, Tier
from rootcellar.cache.native import NativeRadixCache
from rootcellar.cache.radix import PyRadixCache

# Steps between two checks of the invariants: states are compared at each, and a broken one stays broken.
CHECK_EVERY = 16


class Differ(AssertionError):
    """The cores differ."""


class Sharer(NativeRadixCache):
    """Refers to keys' memory wherever it may, however short they are."""

    LEAST_SHARED = 1


class Twins:
    """A Python and a native cache that are asked the same; answers are the Python core's.

    Hits and leases are the Python core's too; their native counterparts are kept beside them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Some worlds record events, some name their pages early; both change no choice that a world makes.
        options |= {"events": options["max_leases"] % 3 == 0, "digests": options["max_leases"] % 2 == 0}
        self.python = PyRadixCache(*arguments, **options)
        self.native = Sharer(*arguments, **options)
        self.kinds, self.page_size, self.tables = self.python.kinds, self.python.page_size, self.python.tables
        self._pairs: dict[int, tuple[Any, Any]] = {}
        self._steps = 0

    # ---- comparing --------------------------------------------------------------------------------------------------

    def _native_of(self, thing: Any) -> Any:
        if isinstance(thing, list):
            return [self._native_of(part) for part in thing]
        return self._pairs[id(thing)][1] if id(thing) in self._pairs else thing

    def _both(self, name: str, *arguments: Any, **options: Any) -> Any:
        ours, error = _outcome(getattr(self.python, name), arguments, options)
        theirs, other = _outcome(getattr(self.native, name), [self._native_of(a) for a in arguments], options)
        if (type(error), str(error)) != (type(other), str(other)):
            raise Differ(f"{name}{arguments}: {error!r} against {other!r}")
        same(ours, theirs, name)
        if type(ours).__name__ in ("Hit", "Lease"):
            self._pairs[id(ours)] = (ours, theirs)
        if error is not None:
            raise error
        return ours

    def compare(self) -> None:
        """Raises unless the whole state of both is the same."""
        ours, theirs = self.python._frozen(), self.native._frozen()
        if ours != theirs:
            raise Differ(first_difference(ours, theirs))
        for a, b in zip(self.python.tables.by_kind, self.native.tables.by_kind, strict=True):
            if not np.array_equal(a, b):
                raise Differ(f"page tables:\n{a}\n{b}")
        for ours, theirs in self._pairs.values():
            if type(ours).__name__ == "Lease":
                same(ours, theirs, "lease")

    # ---- the verbs --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The whole states are compared each time, the invariants recounted now and then."""
        self.compare()
        self._both("take_events")
        self._both("take_evictions")
        self._steps += 1
        if self._steps % CHECK_EVERY == 0:
            self._both("check")
            self._both("pretty_print", self._steps % 20)
            self._both("tree", self._steps % 20)
            for kind, tier in self.python.stats().shelves:
                self._both("used_pages", kind, tier)
                if self._steps % (3 * CHECK_EVERY) == 0:
                    self._both("make_room", kind, self._steps % 9, tier)

    def match(self, key: Key) -> Hit:
        self._both("trail", key)
        hit = self._both("match", key)
        for kind in self.kinds:
            if kind.rule != "recurrent":
                self._both("slots", hit, kind.name)
        return hit

    def grow(self, lease: Lease, tokens: int, *, step: bool = True) -> bool:
        """By itself or as a batch of one, in turns."""
        if not step:
            return self._both("grow", lease, tokens, step=False)
        if self._steps % 2:
            return self._both("grow", lease, tokens)
        return self._both("grow_many", [lease], [tokens])[0]

    def commit(self, lease: Lease, key: Key, *, snapshot: bool = True) -> None:
        if self._steps % 2:
            return self._both("commit", lease, key, **({} if snapshot else {"snapshot": False}))
        return self._both("commit_many", [lease], [key], snapshot=snapshot)

    def close(self, lease: Lease, keep: bool = True) -> None:
        if self._steps % 2:
            self._both("close", lease, *([] if keep else [False]))
        else:
            self._both("close_many", [lease], keep)
        same(lease, self._native_of(lease), "closed lease")
        del self._pairs[id(lease)]

    def _inside(self) -> Any:
        return self.python._inside()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: self._both(name, *arguments, **options)


def _outcome(call: Callable[..., Any], arguments: Any, options: dict[str, Any]) -> tuple[Any, Exception | None]:
    try:
        return call(*arguments, **options), None
    except Exception as error:
        return None, error


def same(ours: Any, theirs: Any, what: str) -> None:
    """Raises unless two answers are the same, whatever their types."""
    name = type(ours).__name__
    if name == "Lease":
        ours, theirs = (_lease(x) for x in (ours, theirs))
    elif name == "Hit":
        ours, theirs = ((x.key, x.version, x.reaches, x.branch, x.length, repr(x)) for x in (ours, theirs))
    elif name == "Move":
        ours, theirs = (_move(x) for x in (ours, theirs))
    elif name == "Manifest":
        ours, theirs = ((x.id, x.tokens, [_part(part) for part in x.parts]) for x in (ours, theirs))
    if isinstance(ours, np.ndarray):
        equal = ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    elif isinstance(ours, list):
        if len(ours) != len(theirs):
            raise Differ(f"{what}: {ours} against {theirs}")
        for a, b in zip(ours, theirs, strict=True):
            same(a, b, what)
        return
    else:
        equal = type(ours) is type(theirs) and ours == theirs
    if not equal:
        raise Differ(f"{what}: {ours!r} against {theirs!r}")


def _lease(x: Any) -> tuple[Any, ...]:
    waits = sorted(x.waits)
    numbers = (x.row, x.serial, x.namespace, x.cached, x.length, x.committed, x.priority)
    return (*numbers, x.lost, x.ready, waits, repr(x))


def _move(x: Any) -> tuple[Any, ...]:
    return (x.id, x.kind, Tier(x.src), Tier(x.dst), x.src_slots.tolist(), x.dst_slots.tolist(), x.first, x.digests)


def _part(x: Any) -> tuple[Any, ...]:
    return (x.kind, x.first, x.slots.dtype, x.slots.tolist(), x.digests)


def first_difference(ours: Any, theirs: Any, where: str = "state") -> str:
    """Where two nested tuples part."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                return first_difference(a, b, f"{where}[{i}]")
    return f"{where}: {ours!r} against {theirs!r}"
