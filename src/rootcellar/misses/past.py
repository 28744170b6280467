"""Prompts that were asked before, as many as there is room for: what a new one is compared with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PROMPTS = 512
TOKENS = 1 << 22
# Of those that seem to begin most alike, the newest are compared token by token; and of all, the newest.
_CLOSEST = 64
_NEWEST = 4
_FIRST_MARK = 16


@dataclass(frozen=True, slots=True, eq=False)  # one is itself: arrays do not say whether they are equal
class Earlier:
    """One of them. ``flushes``: how often all had been forgotten before it; ``tick``: by when it was computed."""

    rid: str
    tokens: NDArray[np.int64]
    namespace: str
    flushes: int
    tick: int = -1
    marks: tuple[int, ...] = field(init=False, repr=False)
    """Hashes of its first 16, 32, 64, ... tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "marks", _marks(self.tokens))


def _marks(tokens: NDArray[np.int64]) -> tuple[int, ...]:
    found, n = [], _FIRST_MARK
    while n <= len(tokens):
        found.append(hash(tokens[:n].tobytes()))
        n *= 2
    return tuple(found)


class Past:
    """The newest prompts of each tenant: at most ``PROMPTS`` and ``TOKENS`` of all; who has most gives way."""

    def __init__(self, prompts: int = PROMPTS, tokens: int = TOKENS) -> None:
        """Remember so many prompts of so many tokens."""
        self._most = prompts, tokens
        self._own: dict[str, deque[Earlier]] = {}
        self._sizes: dict[str, int] = {}
        self._count = self._size = 0

    def add(self, tenant: str, prompt: Earlier) -> None:
        """Remember ``prompt``, which may be one that was remembered, with its answer behind it."""
        own = self._own.setdefault(tenant, deque())
        for each in list(own):
            same = each.rid == prompt.rid or (each is own[-1] and len(each.tokens) == len(prompt.tokens))
            if not same or each.namespace != prompt.namespace:
                continue
            if np.array_equal(each.tokens, prompt.tokens[: len(each.tokens)]):
                own.remove(each)
                self._forget(tenant, each)
        self._own.setdefault(tenant, own).append(prompt)
        self._count += 1
        self._size += len(prompt.tokens)
        self._sizes[tenant] = self._sizes.get(tenant, 0) + len(prompt.tokens)
        while self._count > self._most[0] or self._size > self._most[1]:
            largest = max(self._sizes, key=lambda name: (self._sizes[name], len(self._own[name])))
            self._forget(largest, self._own[largest].popleft())

    def _forget(self, tenant: str, prompt: Earlier) -> None:
        self._count -= 1
        self._size -= len(prompt.tokens)
        self._sizes[tenant] -= len(prompt.tokens)
        if not self._own[tenant]:
            del self._own[tenant], self._sizes[tenant]

    def of(self, tenant: str) -> Iterator[Earlier]:
        """The tenant's, the newest first."""
        return reversed(self._own.get(tenant, ()))

    def closest(self, tenant: str, tokens: NDArray[np.int64]) -> list[tuple[int, Earlier]]:
        """The tenant's prompts that begin most like ``tokens``, and the newest, each with how many tokens are alike.

        The newest first; the closest of each namespace and of each time between two flushes are among them.
        """
        marks = _marks(tokens)
        levels: dict[tuple[str, int], tuple[int, list[Earlier]]] = {}
        newest: dict[str, list[Earlier]] = {}
        for prompt in self.of(tenant):
            level = 0
            for theirs, ours in zip(prompt.marks, marks, strict=False):
                if theirs != ours:
                    break
                level += 1
            group = prompt.namespace, prompt.flushes
            best, found = levels.get(group, (-1, []))
            if level > best:
                levels[group] = level, [prompt]
            elif level == best and len(found) < _CLOSEST:
                found.append(prompt)
            latest = newest.setdefault(prompt.namespace, [])
            if len(latest) < _NEWEST:
                latest.append(prompt)
        chosen = {id(each) for _, found in levels.values() for each in found}
        chosen |= {id(each) for found in newest.values() for each in found}
        return [(common(each.tokens, tokens), each) for each in self.of(tenant) if id(each) in chosen]


def common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many tokens two prompts begin with alike; looks in growing pieces, since most differ soon."""
    n, at, size = min(len(a), len(b)), 0, 64
    while at < n:
        end = min(n, at + size)
        differs = a[at:end] != b[at:end]
        if differs.any():
            return at + int(differs.argmax())
        at, size = end, size * 4
    return n
