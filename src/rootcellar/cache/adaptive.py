"""The ``adaptive`` policy: learn online which pages return, and evict what is least worth the room it takes.

No fixed order is best at every capacity: where prompts return after more tokens than the cache holds, recency keeps
what never returns in time, and a cache does better to keep some prompts for long than all of them briefly. So we
estimate, for each **class** of content, how likely it returns at each **age**, and give an entry the index

    worth(class, age) = max over T of  P(it returns within T more | age) / E[room it takes till it returns or T is over]

in returns per token of time. That is Gittins' index for this stopping problem (Gittins 1979); Beckmann, Chen and
Cidon's LHD (NSDI 2018) ranks by a similar density. Age is counted in prompt tokens served, the currency that
evictions are paid in. The class says how often the content returned before (to a power of two) and, when never,
whether it continues a prompt of its own or branches off one that many share.

What is seen is a **shadow**: prefixes at every ``stride`` tokens, sampled by hash (Waldspurger et al., SHARDS, FAST
2015), remembered beyond their eviction, with the volume at which they were last used. An entry that leaves the shadow
unreturned is a censored observation. Old observations fade at the rate at which the shadow turns over. No constant
here depends on a workload: the shadow looks back ``LOOK_BACK`` cache sizes with at most ``MAX_SHADOW`` samples.

Where what returns nearly fits, or returns by a rhythm that no class has, recency is as good or better. The shadow knows
what LRU would have kept: what was used since the newest prefixes that fill the cache (Denning's working set, 1968). It
is compared with what was there, over ``TRIAL`` cache sizes of prompts at least; where LRU would have had more, by more
than the standard error of that, nothing is worth more than anything else for ``REST`` cache sizes, twice as long each
time, so that the oldest leaves.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heapify, heappop, heappush
from itertools import islice
from math import isqrt
from sys import getsizeof

import numpy as np
from numpy.typing import NDArray

from rootcellar.cache.node import Entry, Item, Node, Standing
from rootcellar.cache.order import AWAITED, Now

FRESH, CONTINUES = 0, 1  # classes of what never returned; from 2 on: returned 1, 2 or 3, 4 to 7, ... times
POPULAR = 4  # what branches off a class from here on is fresh
CLASSES = 9
BUCKETS = 96
# Ages (tokens) at which a bucket begins, two buckets per doubling; whole numbers, so that every core agrees on them.
EDGES = [0, *(isqrt((1 << i) - 1) + 1 for i in range(1, BUCKETS))]
LOOK_BACK = 32
MAX_SHADOW = 1 << 15
STRIDE = 512
SETTLE, TRIAL, REST = 2, 4, 8  # cache sizes: until a trial begins, of a trial, of the first rest after one
LONGEST_REST = 5  # doublings

_WIDTHS = np.diff(np.array([*EDGES, 2 * EDGES[-2]], np.float64))
_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: the multiplier of Fibonacci hashing


def mix(value: int) -> int:
    """A well-mixed 64-bit hash of a 64-bit number (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def group_of(history: int) -> int:
    """The class of a history: itself when it never returned, then one class per doubling of its returns."""
    return history if history <= CONTINUES else min(CLASSES - 1, 1 + (history - 1).bit_length())


class Shadow:
    """What was seen of prompts, resident or not: sampled prefixes, when each was last used, and its class."""

    def __init__(self, capacity: int, page_size: int) -> None:
        self.stride = max(page_size, min(STRIDE, capacity // 64) // page_size * page_size)
        self.window = max(LOOK_BACK * capacity, self.stride)  # tokens of volume that an observation may span
        self.volume = 0
        self.worth = np.zeros((CLASSES, BUCKETS))
        # prefix -> (volume at last use, history: FRESH, CONTINUES, or 1 + how often it returned); oldest use first
        self.seen: dict[int, tuple[int, int]] = {}
        self._weights = np.cumprod(np.full(self.stride, _ODD, np.uint64), dtype=np.uint64)
        self.returns = np.zeros((CLASSES, BUCKETS))
        self.gone = np.zeros((CLASSES, BUCKETS))
        self.sample = 1 << 64  # prefixes with a hash below this are sampled
        self.halvings = 0  # how often that was halved
        self.news = 0  # observations since the last fit
        self.faded = 0
        self.capacity = capacity
        self.resting = False  # whether LRU does better
        self.turned = 0  # the volume at which that changed
        self.watching = False  # whether a trial is under way
        self.failures = 0  # trials that LRU won, those that it did not taken off
        self.watched = 0  # tokens of the trial under way
        self.gap = 0  # of the newest request the strides that LRU would have had, less those that were there
        self.lost = self.noise = 0  # the sum of that over the trial's requests, and of its squares
        self.reach = 1 << 62  # the age up to which LRU keeps a prefix
        self.before = 0  # volume before the newest request

    def bucket(self, age: int) -> int:
        """The age bucket of an age in tokens."""
        return bisect_right(EDGES, age) - 1

    def hashes(self, prefix: int, tokens: NDArray[np.int64]) -> list[int]:
        """Hashes of the prefixes that end with each whole stride of ``tokens``, after the one of hash ``prefix``."""
        count = len(tokens) // self.stride
        blocks = tokens[: count * self.stride].view(np.uint64).reshape(count, self.stride)
        chained = []
        for block in ((blocks * self._weights).sum(axis=1, dtype=np.uint64)).tolist():
            prefix = mix((prefix * _ODD + block + 1) & _MASK)
            chained.append(prefix)
        return chained

    def observe(self, prefixes: list[int], above: int, resident: bool) -> tuple[list[int], int]:
        """A request used these consecutive prefixes; ``above`` is the class of the last one before that was known.

        ``resident``: whether the cache had them, as far as the device does.
        ``above`` is -1 at a root. Returns the class of each now, and the class of the last that was known. Prefixes
        that are not sampled share the class of the sampled one before, or else after, them.
        """
        classes: list[int] = []
        now = -1
        self.news += len(prefixes)
        for prefix in prefixes:
            if prefix < self.sample:
                known = self.seen.pop(prefix, None)
                if known is None:
                    history = now = CONTINUES if -1 < above < POPULAR else FRESH
                else:
                    when, history = known
                    self.returns[group_of(history), self.bucket(self.volume - when)] += 1
                    if self.watching:
                        self.gap += (self.before - when < self.reach) - resident
                    history = max(CONTINUES, history) + 1
                    now = above = group_of(history)
                self.seen[prefix] = (self.volume, history)
                if classes and classes[0] < 0:
                    classes = [now] * len(classes)
            classes.append(now)
        if classes and classes[0] < 0:
            classes = [FRESH] * len(classes)
        return classes, above

    def advance(self, tokens: int) -> None:
        """``tokens`` more of prompts were served."""
        self.lost += self.gap
        self.noise += self.gap * self.gap
        self.gap = 0
        self.before = self.volume
        self.volume += tokens
        # What was done before the last turn is seen for a while.
        self.watching = not self.resting and self.volume - self.turned > SETTLE * self.capacity
        if self.watching:
            self.watched += tokens
        oldest = self.volume - self.window
        while self.seen:
            prefix = next(iter(self.seen))
            when, history = self.seen[prefix]
            if when >= oldest:
                break
            del self.seen[prefix]
            self.gone[group_of(history), self.bucket(self.volume - when)] += 1
        if len(self.seen) > MAX_SHADOW:
            self._thin()
        # A fit costs as much as some hundred observations and some of all that is remembered: this keeps it a fraction.
        if self.news >= 256 + len(self.seen) // 8:
            self.news = 0
            self._compare()
            self._fit()

    def _thin(self) -> None:
        """Sample half as many prefixes from now on."""
        self.sample >>= 1
        self.halvings += 1
        self.seen = {prefix: known for prefix, known in self.seen.items() if prefix < self.sample}
        self.returns /= 2
        self.gone /= 2

    def _compare(self) -> None:
        """Rest where LRU had more of late; learn up to which age it keeps."""
        newest = (self.capacity // self.stride) >> self.halvings
        self.reach = 1 << 62
        if len(self.seen) > newest:
            when, _ = next(islice(reversed(self.seen.values()), newest, None))
            self.reach = self.volume - when
        if self.resting:
            if self.volume - self.turned > (REST * self.capacity) << min(self.failures - 1, LONGEST_REST):
                self._turn()
        elif self.watched > TRIAL * self.capacity:
            # A prompt's strides come and go together: it is the requests that are independent, if anything is.
            if self.lost > 0 and self.lost * self.lost > self.noise:
                self.failures += 1
                self._turn()
            elif self.watched > 8 * TRIAL * self.capacity:
                self.failures = max(0, self.failures - 1)
                self.watched //= 2
                self.lost >>= 1
                self.noise >>= 1

    def _turn(self) -> None:
        self.resting = not self.resting
        self.turned = self.volume
        self.watched = self.lost = self.noise = 0

    def _fit(self) -> None:
        """Learn ``worth`` from the returns seen, what has not returned yet counted as long as it was watched."""
        waiting = np.zeros((CLASSES, BUCKETS))
        if self.seen:
            known = np.array(list(self.seen.values()), np.int64)
            buckets = np.searchsorted(EDGES, self.volume - known[:, 0], side="right") - 1
            histories = known[:, 1]
            doublings = np.frexp(np.maximum(histories - 1, 1))[1]  # the bit length
            groups = np.where(histories <= CONTINUES, histories, np.minimum(CLASSES - 1, 1 + doublings))
            np.add.at(waiting, (groups, buckets), 1)
        left = self.returns + self.gone + waiting
        at_risk = left[:, ::-1].cumsum(axis=1)[:, ::-1] - (self.gone + waiting) / 2
        hazard = np.divide(self.returns, at_risk, out=np.zeros_like(left), where=at_risk >= 1).clip(0, 1)
        for group in range(CLASSES):
            self.worth[group] = 0 if self.resting else _gittins(hazard[group], _WIDTHS)
        if self.volume - self.faded >= self.window:
            self.faded = self.volume
            self.returns /= 2
            self.gone /= 2


def _gittins(hazard: NDArray[np.float64], width: NDArray[np.float64]) -> NDArray[np.float64]:
    """The index at each age bucket: the best ratio of returns to time over all times to give up. Float64."""
    count = len(hazard)
    later = np.triu(np.ones((count, count)))  # [age, bucket]: the bucket is not before the age
    risk = later * hazard
    alive = np.cumprod(1 - risk, axis=1)
    alive = np.concatenate([np.ones((count, 1)), alive[:, :-1]], axis=1)
    returns = np.cumsum(alive * risk, axis=1)
    room = np.cumsum(alive * later * width * (1 - hazard / 2), axis=1)
    ratio = np.divide(returns, room, out=np.zeros_like(room), where=room > 0)
    return np.asarray(ratio.max(axis=1))


class LearnedOrder:
    """The order of leaving by worth: one heap, oldest first, per damage, class and age bucket.

    Entries of one heap differ in age only within a bucket, so the heads are the candidates; the one worth least
    leaves. A head that has aged moves on to the next bucket's heap. What is known to be asked for again has heaps of
    its own, in the order of when: there is nothing to learn of it.
    """

    __slots__ = ("_heaps", "_live", "_moved", "_serial", "_shadow")

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow
        self._heaps: dict[tuple[int, int, int], list[Item]] = {}
        self._live = 0
        self._serial = 0
        self._moved = -1  # volume at which the heads were last moved on

    def push(self, node: Node, entry: Entry, key: Standing) -> None:
        """File an entry under ``key = (damage, class, volume at last use, node id, shelf index)``, or its time."""
        if entry.item is None:
            self._live += 1
        elif entry.item[0] == key:
            return
        self._serial += 1
        entry.item = (key, self._serial, node, entry)
        self._file(entry.item)
        if self._serial % 64 == 0:
            self._compact()

    def _file(self, item: Item) -> None:
        damage, group, used, *_ = item[0]
        if damage >= AWAITED:
            heappush(self._heaps.setdefault((int(damage), 0, 0), []), item)
            return
        bucket = self._shadow.bucket(int(self._shadow.volume - used))
        heappush(self._heaps.setdefault((int(damage), int(group), bucket), []), item)

    def _compact(self) -> None:
        if sum(map(len, self._heaps.values())) > 2 * self._live + 64:
            for where, heap in list(self._heaps.items()):
                self._heaps[where] = [item for item in heap if item[3].item is item]
                heapify(self._heaps[where])
        self._heaps = {where: heap for where, heap in self._heaps.items() if heap}

    def forget(self, entry: Entry) -> None:
        """The entry left its shelf."""
        if entry.item is not None:
            entry.item = None
            self._live -= 1

    def memory_bytes(self) -> int:
        """Bytes of the heaps, the items of entries not counted."""
        return getsizeof(self._heaps) + sum(map(getsizeof, self._heaps.values()))

    def pop(self, now: Now) -> tuple[Node, Entry] | None:
        """The entry that should leave next; None when nothing may. It is no longer filed."""
        if self._moved != self._shadow.volume:
            self._age()
        while True:
            heap = self._least()
            if heap is None:
                return None
            key, _, node, entry = heappop(heap)
            entry.item = None
            self._live -= 1
            true = now(node, entry)
            if true == key:
                return node, entry
            if true is not None:
                self.push(node, entry, true)

    def _age(self) -> None:
        """Move heads that have left their bucket on."""
        self._moved = volume = self._shadow.volume
        for (damage, _, bucket), heap in list(self._heaps.items()):
            if damage >= AWAITED:
                continue
            while heap and self._shadow.bucket(int(volume - heap[0][0][2])) != bucket:
                item = heappop(heap)
                if item[3].item is item:
                    self._file(item)

    def _least(self) -> list[Item] | None:
        """The heap whose head is worth least; the older of equals."""
        best: list[Item] | None = None
        rank: Standing = ()
        worth = self._shadow.worth
        for (damage, group, bucket), heap in self._heaps.items():
            while heap and heap[0][3].item is not heap[0]:
                heappop(heap)
            if heap:
                _, _, *last = heap[0][0]
                head = (damage, worth[group, bucket], *last)
                if best is None or head < rank:
                    best, rank = heap, head
        return best
