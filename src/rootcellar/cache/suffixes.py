"""Where text stands that ends like a given one: an index of what went through the cache, to guess what comes next.

    text     [ segment ..... | segment | ..]   a ring of ``capacity`` tokens; the oldest are written over
    places    by their last ``ANCHOR`` tokens, the newest first, each linked to the one before it

A segment is some tokens of one namespace in a row. Asked for what followed a text, the index goes through the newest
places at which its last tokens stand, some tens of them, and takes what followed at that which agrees with most tokens
before; the newest of equals. So a question takes bounded time, however often something was said (LZ77's match finder,
as deflate has it; Ziv and Lempel 1977).

Text takes some bytes a token where keys and values take thousands: what was evicted may still be guessed.
Blocks of the ring belong to one namespace each, and only text of the asking one is looked at.

This is the twin of ``native/suffixes.cc``, which takes 12 bytes a token; here places are in a dict.
"""

from __future__ import annotations

from collections import deque
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.key import Key

ANCHOR = 4
"""Tokens that must stand at a place: two bigrams."""
BLOCK = 64
"""Tokens of the ring that belong to one namespace."""
_END = -1
"""What stands behind a segment."""
_Anchor = tuple[bytes, int, int]
"""What a place is found by: its owner, and its last two bigrams."""


def owner_of(namespace: str, tenant: str = "") -> bytes:
    """A tenant's part of a namespace, in 16 bytes that no other has."""
    names = (name.encode("utf-8", "surrogatepass") for name in (namespace, tenant))
    return sha256(b"\xff".join(names)).digest()[:16]  # a byte that stands in no name


def _said(tokens: NDArray[np.int64]) -> bool:
    """Whether somebody may say all of these: an image's placeholders have ids of 64 bits."""
    return not len(tokens) or (int(tokens.min()) >= 0 and int(tokens.max()) < 1 << 31)


class PySuffixes:
    """The index in Python."""

    def __init__(self, capacity: int, longest: int, tries: int) -> None:
        """``capacity`` tokens, in whole blocks; up to ``longest`` tokens are compared, at ``tries`` places."""
        self.capacity = max(1, -(-capacity // BLOCK)) * BLOCK
        self._longest, self._tries = max(longest, ANCHOR), tries
        self._tokens = np.full(self.capacity, _END, np.int64)
        self._owners = [b""] * (self.capacity // BLOCK)
        self._next = 0  # tokens written since the start: the place of the next one
        self._places: dict[_Anchor, deque[int]] = {}
        self._filed: list[list[_Anchor]] = [[] for _ in self._owners]  # by block: under what its places are, in order

    def add(self, owner: bytes, tokens: NDArray[np.int64]) -> None:
        """A segment of a namespace's ``owner``, the last tokens of too many; not where one is no token of a text."""
        tokens = tokens[-(self.capacity - 1) :]
        if not _said(tokens):
            return
        bigrams = Key(tokens).bigrams().tokens
        start = self._next
        for at in range(start, start + -(-(len(tokens) + 1) // BLOCK) * BLOCK, BLOCK):
            self._clear(at)
            self._owners[at % self.capacity // BLOCK] = owner
            self._next += BLOCK
        for i, token in enumerate(tokens.tolist()):
            self._tokens[(start + i) % self.capacity] = token
        for i in range(ANCHOR - 1, len(tokens)):
            anchor = owner, int(bigrams[i - 3]), int(bigrams[i - 1])
            self._places.setdefault(anchor, deque()).append(start + i)
            self._filed[(start + i) % self.capacity // BLOCK].append(anchor)

    def _clear(self, at: int) -> None:
        """Forget what a block had before."""
        begin = at % self.capacity
        self._tokens[begin : begin + BLOCK] = _END
        for anchor in self._filed[begin // BLOCK]:
            places = self._places[anchor]
            places.popleft()  # the oldest of all, since the oldest block is cleared first
            if not places:
                del self._places[anchor]
        self._filed[begin // BLOCK] = []

    def find(self, owner: bytes, tokens: NDArray[np.int64], most: int) -> tuple[int, tuple[int, ...]]:
        """How many of the last tokens stand at the best place of ``owner``, and up to ``most`` that followed there."""
        tokens = tokens[-self._longest :]
        if len(tokens) < ANCHOR or not _said(tokens):
            return 0, ()
        bigrams = Key(tokens).bigrams().tokens
        oldest = self._next - self.capacity
        places = self._places.get((owner, int(bigrams[-3]), int(bigrams[-1])), ())
        best, where, tries = 0, 0, 0
        for end in reversed(places):
            if end - (ANCHOR - 1) < oldest or tries == self._tries:
                break
            if self._at(end + 1) == _END:
                continue
            tries += 1
            matched = ANCHOR
            while matched < len(tokens) and end - matched >= oldest and self._at(end - matched) == tokens[-1 - matched]:
                matched += 1
            if matched > best:
                best, where = matched, end
        said = [self._at(where + 1 + i) for i in range(most)] if best else []
        stop = said.index(_END) if _END in said else len(said)
        return best, tuple(said[:stop])

    def _at(self, place: int) -> int:
        return int(self._tokens[place % self.capacity]) if place < self._next else _END

    def clear(self) -> None:
        """Forget all text."""
        self._tokens.fill(_END)
        self._places.clear()
        self._filed = [[] for _ in self._owners]

    def memory_bytes(self) -> int:
        """Bytes of the text and of what finds it, roughly."""
        return self._tokens.nbytes + 96 * sum(map(len, self._places.values()))
