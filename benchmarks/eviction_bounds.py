"""How far from LRU to the offline optimum a policy comes that knows a part of the future.

    python benchmarks/eviction_bounds.py TRACE [TRACE ...] [--capacity 1M,2M,5M] [--learn]

A trace is a file in Mooncake's format, or ``generated:NAME``. A leaf-first cache of blocks evicts by Gittins' index
(see ``rootcellar/cache/adaptive.py``), whose chances of return come from an oracle:

- ``all``: knows when each block is asked for next;
- ``when x4``, ``x16``: knows whether, and when up to such a factor;
- ``whether``: knows whether it ever is, and no more of when than how long such blocks take;
- ``whether, N % wrong``: is told the contrary so often.

Prints hit rates and shares of the distance in percent, as JSON.

``--learn`` (with scikit-learn) asks how much of that could be known: gradient boosting learns from the first half of
the trace when blocks return, by how often they were used before, or by all that was seen of them too (``FEATURES``).
Counted is the second half, beside ``adaptive``, which learns as it goes; shares are of the way from LRU to ``all``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cache_policies import read
from numpy.typing import NDArray

from rootcellar.commands.replay import parse_tokens
from rootcellar.sim.replay import optimal, replay
from rootcellar.sim.trace import BLOCK, TraceRequest

EDGES = np.array([0.0, *(2 ** (k / 2) for k in range(24, 56))])  # ages (tokens) at which a bucket begins
WIDTHS = np.diff([*EDGES, 2 * EDGES[-1]])
NEVER = np.inf
Floats = NDArray[np.float64]
AGES = [0, *(2**k for k in range(15, 28))]  # ages at which a bucket of what is learned begins
FEATURES = {"uses": slice(0, 1), "all that was seen": slice(None)}


class Run(NamedTuple):
    """Blocks ``[start, end)`` of one request's prompt, which were used equally often before."""

    request: int
    start: int
    end: int


class Trace:
    """A trace, its runs, the run of each block of each prompt, and when that is asked for next."""

    def __init__(self, requests: Sequence[TraceRequest]) -> None:
        self.requests = requests
        self.volume = np.cumsum([r.input_length for r in requests], dtype=float)
        self.runs: list[Run] = []
        self.rows: list[NDArray[np.int64]] = []
        self._find_runs()
        self.returns = np.full(len(self.runs), NEVER)  # tokens until the last whole block of a run is used again
        self.next = [np.zeros(0)] * len(requests)  # by request: the request that uses each block next
        self._find_returns()

    def _find_runs(self) -> None:
        uses: Counter[int] = Counter()
        for i, request in enumerate(self.requests):
            ids = request.hash_ids
            counts = [uses[block] for block in ids]
            edges = [0, *(j for j in range(1, len(ids)) if counts[j] != counts[j - 1]), len(ids)]
            rows = np.zeros(len(ids), np.int64)
            for start, end in pairwise(edges):
                rows[start:end] = len(self.runs)
                self.runs.append(Run(i, start, end))
            self.rows.append(rows)
            uses.update(ids)

    def _find_returns(self) -> None:
        following: dict[int, int] = {}
        row = len(self.runs)
        for i in range(len(self.requests) - 1, -1, -1):
            ids = self.requests[i].hash_ids
            self.next[i] = np.array([following.get(block, NEVER) for block in ids])
            while row and self.runs[row - 1].request == i:
                row -= 1
                run = self.runs[row]  # a prompt's last block is seldom whole
                block = ids[max(run.start, run.end - 1 - (run.end == len(ids)))]
                if block in following:
                    self.returns[row] = self.volume[following[block]] - self.volume[i]
            following.update(dict.fromkeys(ids, i))

    def weights(self) -> Floats:
        """Blocks of each run."""
        return np.array([run.end - run.start for run in self.runs], float)

    def since(self) -> Floats:
        """Of each run the volume at which it was used."""
        return self.volume[[run.request for run in self.runs]]


def hits(trace: Trace, capacity: int, rows: Sequence[NDArray[np.int64]], worth: Floats) -> Floats:
    """By request the tokens hit in a leaf-first cache that evicts what has least ``worth[row, age bucket]``.

    Of equals the oldest. ``rows``: by request the row of each block from then on. A prompt that runs keeps its blocks.
    """
    room = capacity // BLOCK
    row: dict[int, int] = {}  # of what is cached
    used: dict[int, float] = {}
    parent: dict[int, int] = {}
    children: defaultdict[int, int] = defaultdict(int)
    leaves: dict[int, None] = {}
    hit = np.zeros(len(trace.requests))
    for i, request in enumerate(trace.requests):
        ids, now = request.hash_ids, trace.volume[i]
        known = next((n for n, block in enumerate(ids) if block not in row), len(ids))
        hit[i] = min(known * BLOCK, request.input_length)
        running = set(ids)
        lacking = min(len(ids), room) - known - (room - len(row))
        if lacking > 0:
            line = [leaf for leaf in leaves if leaf not in running]
            last = [used[leaf] for leaf in line]
            buckets = np.searchsorted(EDGES, now - np.array(last), side="right") - 1
            heap = list(zip(worth[[row[leaf] for leaf in line], buckets].tolist(), last, line, strict=True))
            heapify(heap)
            while lacking > 0 and heap:
                _, _, leaf = heappop(heap)
                del row[leaf], used[leaf], leaves[leaf]
                lacking -= 1
                above = parent[leaf]
                children[above] -= 1
                if above in row and not children[above]:
                    leaves[above] = None
                    if above not in running:
                        bucket = int(np.searchsorted(EDGES, now - used[above], side="right")) - 1
                        heappush(heap, (float(worth[row[above], bucket]), used[above], above))
        for n, block in enumerate(ids):
            if block not in row:
                if len(row) >= room:
                    break
                parent[block] = ids[n - 1] if n else -1
                children[parent[block]] += 1
                leaves.pop(parent[block], None)
                leaves[block] = None
            row[block], used[block] = int(rows[i][n]), now
    return hit


def gittins(hazard: Floats) -> Floats:
    """The best ratio of returns to time over all times to give up, by row and age bucket."""
    worth = np.zeros_like(hazard)
    for age in range(len(EDGES)):
        alive, returns, room = np.ones(len(hazard)), np.zeros(len(hazard)), np.zeros(len(hazard))
        for bucket in range(age, len(EDGES)):
            chance = hazard[:, bucket]
            returns += alive * chance
            room += alive * WIDTHS[bucket] * (1 - chance / 2)
            alive = alive * (1 - chance)
            worth[:, age] = np.maximum(worth[:, age], returns / np.maximum(room, 1e-9))
    return worth


def survival(trace: Trace, members: NDArray[np.bool_]) -> Floats:
    """Of these runs the share that returns in each age bucket, of those that did not before."""
    until = np.where(np.isfinite(trace.returns), trace.returns, trace.volume[-1] - trace.since())
    buckets = np.searchsorted(EDGES, until, side="right") - 1
    returns, watched = (
        np.bincount(buckets[chosen], trace.weights()[chosen], len(EDGES))
        for chosen in (members & np.isfinite(trace.returns), members & ~np.isfinite(trace.returns))
    )
    at_risk = np.cumsum((returns + watched)[::-1])[::-1] - watched / 2
    return np.divide(returns, at_risk, out=np.zeros(len(EDGES)), where=at_risk > 0)


def told(trace: Trace, groups: NDArray[np.int64]) -> Floats:
    """The worth of runs where nothing is known but their group, and how long those of a group take."""
    hazard = np.zeros((len(trace.runs), len(EDGES)))
    for group in np.unique(groups):
        hazard[groups == group] = survival(trace, groups == group)
    return gittins(hazard)


Policy = tuple[Sequence[NDArray[np.int64]], Floats]


def policies(trace: Trace) -> dict[str, Policy]:
    """The rows of blocks and their worth, by what is known."""
    finite = np.isfinite(trace.returns)
    doublings = np.where(finite, np.log2(np.maximum(trace.returns, 1, where=finite, out=np.ones(len(finite)))), -1)
    known: dict[str, NDArray[np.int64]] = {
        "when x4": np.floor(doublings / 2).astype(np.int64),
        "when x16": np.floor(doublings / 4).astype(np.int64),
        "whether": finite.astype(np.int64),
    }
    rng = np.random.default_rng(0)
    for percent in (5, 10, 20, 30):
        known[f"whether, {percent} % wrong"] = (finite ^ (rng.random(len(finite)) < percent / 100)).astype(np.int64)
    later, exact = np.unique(np.concatenate(trace.next), return_inverse=True)
    ends = np.cumsum([len(each) for each in trace.next])[:-1]
    worth = np.repeat(np.where(np.isfinite(later), 1 / (1 + later), 0)[:, None], len(EDGES), axis=1)
    found: dict[str, Policy] = {"lru": (trace.rows, np.zeros((len(trace.runs), len(EDGES))))}
    found["all"] = np.split(exact, ends), worth
    found |= {name: (trace.rows, told(trace, groups)) for name, groups in known.items()}
    return found


# ---- what could be known ---------------------------------------------------------------------------------------------


def seen(trace: Trace) -> Floats:
    """Of each run what a cache could see at its use: its uses, then lengths, places, and times since it was used."""
    found: list[list[float]] = []
    uses: Counter[int] = Counter()
    last: dict[int, tuple[float, float]] = {}  # volume and milliseconds
    first: dict[int, float] = {}
    row = 0
    for i, request in enumerate(trace.requests):
        ids, now, when = request.hash_ids, trace.volume[i], request.timestamp or 0.0
        new = sum(block not in uses for block in ids)
        while row < len(trace.runs) and trace.runs[row].request == i:
            run = trace.runs[row]
            block = ids[max(run.start, run.end - 1 - (run.end == len(ids)))]
            tokens, time = (now - last[block][0], when - last[block][1]) if block in last else (0, 0)
            average = (when - first.get(block, when)) / max(1, uses[block])
            lengths = request.input_length, request.output_length
            places = run.start, run.end - run.start, len(ids) - run.end, run.end / len(ids), new, new / len(ids)
            found.append([uses[block], *map(np.log1p, (*lengths, tokens, time, average)), *places])
            row += 1
        uses.update(ids)
        last.update(dict.fromkeys(ids, (float(now), when)))
        for block in ids:
            first.setdefault(block, when)
    return np.array(found)


def learned(trace: Trace, features: Floats) -> Floats:
    """The worth of runs by what is learned of the first half: a chance of return by age, given that none was before."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    half, since = len(trace.requests) // 2, trace.since()
    end = trace.volume[half]
    returned = np.isfinite(trace.returns) & (since + trace.returns <= end)
    until = np.where(returned, trace.returns, end - since)
    rows, came, weights = [], [], []
    for age, (begin, over) in enumerate(pairwise([*AGES, NEVER])):
        now = returned & (until >= begin) & (until < over)
        watched = (since <= end) & (now | (until >= over))
        rows.append(np.column_stack([features[watched], np.full(watched.sum(), age)]))
        came.append(now[watched])
        weights.append(trace.weights()[watched])
    model = HistGradientBoostingClassifier(max_iter=60, learning_rate=0.06, max_leaf_nodes=8, min_samples_leaf=40)
    model.fit(np.concatenate(rows), np.concatenate(came), np.concatenate(weights))
    every = (np.column_stack([features, np.full(len(features), age)]) for age in range(len(AGES)))
    chances = np.stack([model.predict_proba(each)[:, 1] for each in every], axis=1)
    ages = np.searchsorted(AGES, EDGES, side="right") - 1
    hazard = 1 - (1 - chances[:, ages]) ** (1 / np.bincount(ages)[ages])
    hazard[:, -1] = 0
    return gittins(hazard)


def second_half(trace: Trace, capacity: int, known: dict[str, Policy], worths: dict[str, Floats]) -> dict[str, float]:
    """Hit rates over the second half: of LRU, of ``all``, of what is learned, and of ``adaptive``."""
    half = len(trace.requests) // 2
    asked = sum(request.input_length for request in trace.requests[half:])
    candidates = {name: known[name] for name in ("lru", "all")} | {n: (trace.rows, w) for n, w in worths.items()}
    rates = {name: hits(trace, capacity, *policy)[half:].sum() / asked for name, policy in candidates.items()}
    both = [
        replay(requests, capacity=capacity, policy="adaptive") for requests in (trace.requests, trace.requests[:half])
    ]
    return rates | {"adaptive": (both[0].hit_tokens - both[1].hit_tokens) / asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", nargs="+")
    parser.add_argument("--capacity", default="1M,2M,5M")
    parser.add_argument("--learn", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.trace:
        trace = Trace(read(name))
        worths: dict[str, Floats] = {}
        if arguments.learn:
            features = seen(trace)
            worths = {known: learned(trace, features[:, some]) for known, some in FEATURES.items()}
        candidates = policies(trace)
        for capacity in map(parse_tokens, arguments.capacity.split(",")):
            found: dict[str, object] = {"trace": Path(name).name, "capacity_tokens": capacity}
            if arguments.learn:
                rates = second_half(trace, capacity, candidates, worths)
                best = rates["all"]
            else:
                asked = trace.volume[-1]
                rates = {known: hits(trace, capacity, *policy).sum() / asked for known, policy in candidates.items()}
                best = optimal(trace.requests, capacity=capacity).hit_rate
                found["optimum"] = round(100 * best, 2)
            least = rates["lru"]
            found["hit_rate"] = {known: round(100 * rate, 2) for known, rate in rates.items()}
            found["share_of_distance"] = {
                known: round(100 * (rate - least) / (best - least)) for known, rate in rates.items() if best > least
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
