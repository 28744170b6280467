"""In which order entries leave an arena: one heap per arena, and the policies that key it."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from sys import getsizeof

from rootcellar.cache.node import Entry, Item, Node, Standing
from rootcellar.errors import ConfigError

Now = Callable[[Node, Entry], Standing | None]
"""Where an entry stands now; None when it may not leave."""


AWAITED, QUEUED = 3, 4
"""The damages of what is known to be asked for again, some time or by a request that waits already: it leaves last, and
of several what is wanted last first."""
NEVER, LATEST = -1, 2**31 - 1
"""What ``expect`` is told of what nobody will ask for again, and the latest time that it knows."""


class Order:
    """A heap of entries that may leave. O(log n) to file or take one; at most one item of an entry is live.

    A key that grew since it was filed (the entry was used again) is noticed when the item comes up, and filed anew:
    every filed key is at most the true one, so the first item that is true is the least. A key that became smaller
    must be filed by whoever made it smaller (``Tree.requeue``).
    """

    __slots__ = ("_heap", "_live", "_serial")

    def __init__(self) -> None:
        self._heap: list[Item] = []
        self._live = 0
        self._serial = 0

    def push(self, node: Node, entry: Entry, key: Standing) -> None:
        """File an entry under ``key``; an item it had before is dead from now on."""
        if entry.item is None:
            self._live += 1
        elif entry.item[0] == key:
            return
        self._serial += 1
        entry.item = (key, self._serial, node, entry)
        heappush(self._heap, entry.item)
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [item for item in self._heap if item[3].item is item]
            heapify(self._heap)

    def forget(self, entry: Entry) -> None:
        """The entry left its shelf."""
        if entry.item is not None:
            entry.item = None
            self._live -= 1

    def memory_bytes(self) -> int:
        """Bytes of the heap, the items of entries not counted."""
        return getsizeof(self._heap)

    def pop(self, now: Now) -> tuple[Node, Entry] | None:
        """The entry that should leave next; None when nothing may. It is no longer filed."""
        while self._heap:
            item = heappop(self._heap)
            key, _, node, entry = item
            if entry.item is not item:
                continue
            entry.item = None
            self._live -= 1
            true = now(node, entry)
            if true == key:
                return node, entry
            if true is not None:
                self.push(node, entry, true)
        return None


Policy = Callable[[Node, int], Standing]

# What each policy says of a node for one kind: the smallest leaves first, ties by the node's age.
POLICIES: dict[str, Policy] = {
    # Least recently used.
    "lru": lambda node, k: (node.ticks[k],),
    # Least often opened; among equals the least recent.
    "lfu": lambda node, k: (node.hits, node.ticks[k]),
    # Oldest, used or not.
    "fifo": lambda node, _: (node.created,),
    # Newest: keeps what came early.
    "filo": lambda node, _: (-node.created,),
    # Most recently used: for cyclic scans longer than the cache.
    "mru": lambda node, k: (-node.ticks[k],),
    # Segmented LRU (Karedla et al. 1994; SGLang's ``slru``): what was never used again leaves before what was.
    "slru": lambda node, k: (node.hits > 0, node.ticks[k]),
    # Lowest priority of the requests that used it, then the least recent.
    "priority": lambda node, k: (node.priority, node.ticks[k]),
    # What is least worth its room, as learned online; see ``adaptive.py``, which ranks these classes.
    "adaptive": lambda node, _: (node.group, node.used),
}


def policy_named(policy: str) -> Policy:
    """The fixed policy of this name. Raises ``ConfigError`` naming the known ones."""
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r} is unknown; choose one of {', '.join(POLICIES)}")
    return POLICIES[policy]
