"""What the sides of ``cache_core.py`` share: how a task is timed, the keys, the trace. Standard library only.

A *side* is one implementation in a process of its own, perhaps with another interpreter. For each row that it offers it
has a function ``(**arguments) -> Task`` which prepares everything and is not timed.
"""

from __future__ import annotations

import gc
import json
import random
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

POOL = 2_000_000  # tokens, wherever a row says nothing else
KEY = 8192  # tokens of the key that is matched and inserted
EXTEND, EXTEND_TOKENS, EXTEND_PREFIX = 32, 256, 1024  # requests; 32 * 256 is one chunk of 8,192 tokens
DECODE, DECODE_PREFIX = 256, 1000  # requests; request i has DECODE_PREFIX + i tokens
DECODE_ROOM = 1024  # steps that a row of the page table has room for
ENTRY = 1024  # tokens of an entry of the scaling rows
HOT = 8  # entries that the scaling rows match in turn
REQUESTS = 3000  # of the trace


class Skip(Exception):
    """This side does not offer the row; the message says why."""


@dataclass
class Task:
    """A row made ready: ``action(before())`` is one sample, of which only ``action`` is timed.

    What reading the clock takes is not counted. ``inner`` repeats of an action (which then takes None) make one sample
    where a single one is too short to time. ``once`` samples are seconds, not microseconds: one is taken per visit, in
    CPU time of the process, which other work on the machine does not stretch as it does wall time (a side has one
    thread and waits for nothing). ``facts`` is read after measuring.
    """

    action: Callable[[Any], object]
    before: Callable[[], Any] = lambda: None
    inner: int = 1
    once: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


Rows = dict[str, Callable[..., Task]]


def price_of(clock: Callable[[], int]) -> int:
    """Nanoseconds that a sample of nothing takes: the median of many."""
    found = []
    for _ in range(1001):
        begin = clock()
        found.append(clock() - begin)
    return sorted(found)[500]


def measure(task: Task, seconds: float, most: int) -> list[float]:
    """Microseconds of each action, for ``seconds`` of wall time and at most ``most`` samples, at least one.

    The garbage collector is off: it would charge whoever makes most objects at a random moment.
    """
    before, action, inner = task.before, task.action, task.inner
    clock = time.process_time_ns if task.once else time.perf_counter_ns
    samples, nothing = [], price_of(clock)
    gc.collect()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        while not samples or (not task.once and len(samples) < most and time.monotonic() < end):
            given = before()
            if inner == 1:
                begin = clock()
                action(given)
                took = clock() - begin
            else:
                begin = clock()
                for _ in range(inner):
                    action(given)
                took = clock() - begin
            samples.append(max(took - nothing, 0) / inner / 1000)
    finally:
        gc.enable()
    return samples


# ---- keys -----------------------------------------------------------------------------------------------------------


def tokens(seed: int, length: int) -> array:
    """``length`` token ids that depend on ``seed`` alone, as int64; the first names the seed, so no two keys share."""
    found = array("q", random.Random(seed).choices(range(150_000), k=length))
    found[0] = 1_000_000 + seed
    return found


def leaf(number: int, size: int) -> array:
    """A key of ``size`` tokens with a first token of its own; cheap to make by the million."""
    return array("q", [number] * size)


def serials(start: int = 2) -> Callable[[], int]:
    """The numbers from ``start`` on, one a call: what makes each sample's key new."""
    return count(start).__next__


def branches(key: array, nodes: int, page_size: int) -> Iterator[array]:
    """Keys that part from ``key`` at ``nodes - 1`` places and so cut it into ``nodes`` equal nodes."""
    step = len(key) // nodes
    for i in range(1, nodes):
        yield key[: i * step] + tokens(10_000 + i, page_size)


def prompts(path: str, most: int = REQUESTS) -> list[array]:
    """The first prompts of a trace in Mooncake's format as token ids: block ``b`` is ``b * 512, b * 512 + 1, ...``."""
    found = []
    with open(path, encoding="utf-8") as lines:
        for line in islice(lines, most):
            request = json.loads(line)
            prompt = array("q")
            for block in request["hash_ids"]:
                prompt.extend(range(block * 512, block * 512 + 512))
            found.append(prompt[: request["input_length"]])
    return found


def cached(tokens_cached: int) -> list[array]:
    """The entries of the scaling rows: keys that hold ``tokens_cached`` together, none sharing."""
    return [leaf(i, ENTRY) for i in range(tokens_cached // ENTRY)]


def hot(keys: list[array]) -> list[array]:
    """A few entries from all over the cache, the same throughout: the algorithm's cost, not the memory's."""
    return keys[:: max(1, len(keys) // HOT)][:HOT]


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[1]) * 4096
