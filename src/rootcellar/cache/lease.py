"""Leases: what a request that runs owns and pins.

For each paged kind, the row of the page table of a lease reads, left to right:

    page     0 ........ starts[k] ........... committed ............. pages of length
             | released | pinned in the tree  | owned by the lease    |
             |  0 0 0   | 7 8 9               | 12 13 14              | 0 0 0 ...

``commit`` moves pages from the right part to the middle part, ``grow`` lengthens the right part, and the rule moves
``starts[k]``. The three boundaries are the whole state: there are no lists of pages beside the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache import words
from rootcellar.cache.node import Node


class Lease:
    """A running request's hold on the cache. Read it; only the cache writes it.

    ``row`` indexes the page tables. ``cached`` tokens were there at ``open``, ``length`` tokens have slots, and
    ``committed`` tokens are in the tree. ``ready`` is false while copies to the device are under way; ``lost`` says
    that one failed: close the lease and match again.
    """

    __slots__ = (
        "cached",
        "committed",
        "length",
        "lost",
        "namespace",
        "node",
        "observed",
        "priority",
        "row",
        "serial",
        "sources",
        "starts",
        "stepped",
        "waits",
    )  # fmt: skip

    def __init__(self, row: int, serial: int, node: Node, namespace: str, cached: int, priority: int) -> None:
        self.row = row
        self.serial = serial
        self.node = node
        self.namespace = namespace
        self.cached = cached
        self.length = cached
        self.committed = cached
        self.priority = priority
        self.starts: list[int] = []  # by kind: absolute page at which the pin begins
        self.sources: list[Node | None] = []  # by kind: the node whose recurrent snapshot is being read
        self.stepped = False  # whether tokens were grown since the state to read last changed
        self.waits: set[int] = set()  # ids of the moves that must be done first
        self.lost = False
        self.observed: tuple[int, int, int] = (0, 0, -1)  # adaptive policy: strides observed, prefix hash, class above

    @property
    def ready(self) -> bool:
        """Whether everything the rule asks for is on the device."""
        return not self.waits and not self.lost

    def __repr__(self) -> str:
        return words.lease(self.row, self.cached, self.length, self.lost, len(self.waits))


class ReqToTokenPool:
    """The page tables of live leases: one int32 array per kind, a row per lease.

    ``pool[kind]`` is ``[max_leases + 1, ceil(max_length / page_size)]``: entry ``i`` of a row is the page of tokens
    ``[i * page_size, (i + 1) * page_size)``, 0 where there is none (any more). For a recurrent kind it is
    ``[max_leases + 1, 2]``: the state to read (0: start from zeros) and the state to write. Row 0 is all zeros, for
    padded batch rows.
    """

    __slots__ = ("_tables", "by_kind")

    def __init__(self, names: Sequence[str], widths: Sequence[int], max_leases: int) -> None:
        self.by_kind = [np.zeros((max_leases + 1, width), np.int32) for width in widths]
        self._tables = dict(zip(names, self.by_kind, strict=True))

    def __getitem__(self, kind: str) -> NDArray[np.int32]:
        return self._tables[kind]
