"""How far each policy comes from LRU to the offline optimum, and what it costs a request.

    python benchmarks/cache_policies.py TRACE [TRACE ...] [--capacity 1M,2M,5M] [--policy lru,adaptive] [--remember]

A trace is a file in Mooncake's format, or ``generated:NAME``. Prints, by capacity and policy, the hit rate in percent,
the share of the distance in percent, and milliseconds a request in the whole replay. ``--remember`` adds LFU and SLRU
with a perfect memory as yardsticks: the policies of the cache count uses while content is resident; these count every
use of every block ever seen, which no real cache can, and evict leaf first, block by block.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from time import perf_counter

from rootcellar.cache.order import POLICIES as FIXED
from rootcellar.commands.replay import GENERATED, parse_tokens
from rootcellar.sim.replay import optimal, replay
from rootcellar.sim.trace import BLOCK, TraceRequest, parse
from rootcellar.sim.workloads import workload

Standing = Callable[[int, int], tuple[int, ...]]  # (uses beyond the first, last use) -> smallest leaves first

POLICIES: dict[str, Standing] = {
    "lfu that remembers": lambda uses, last: (uses, last),
    "slru that remembers": lambda uses, last: (uses > 0, last),
}


def remembering(requests: list[TraceRequest], capacity: int, standing: Standing) -> float:
    """The hit rate of a leaf-first cache of blocks whose policy forgets nothing."""
    room = capacity // BLOCK
    uses: Counter[int] = Counter()
    last: dict[int, int] = {}
    parent: dict[int, int] = {}
    children: defaultdict[int, int] = defaultdict(int)
    cached: set[int] = set()
    leaves: list[tuple[tuple[int, ...], int]] = []

    def file(block: int) -> None:
        heappush(leaves, (standing(uses[block] - 1, last[block]), block))

    def evict(running: set[int]) -> bool:
        while leaves:
            key, block = heappop(leaves)
            if block not in cached or children[block] or block in running:
                continue
            if key != standing(uses[block] - 1, last[block]):
                file(block)
                continue
            cached.discard(block)
            above = parent[block]
            children[above] -= 1
            if above in cached and not children[above] and above not in running:
                file(above)
            return True
        return False

    hit = asked = 0
    for i, request in enumerate(requests):
        ids = request.hash_ids
        known = next((n for n, block in enumerate(ids) if block not in cached), len(ids))
        hit += min(known * BLOCK, request.input_length)
        asked += request.input_length
        uses.update(ids)
        last.update(dict.fromkeys(ids, i))
        running, end = set(ids), known
        while end < len(ids) and (len(cached) < room or evict(running)):
            cached.add(ids[end])
            parent[ids[end]] = ids[end - 1] if end else -1
            children[parent[ids[end]]] += 1
            end += 1
        if end and not children[ids[end - 1]]:
            file(ids[end - 1])
    return hit / asked


def read(name: str) -> list[TraceRequest]:
    if name.startswith(GENERATED):
        return workload(name.removeprefix(GENERATED))
    with open(name, encoding="utf-8") as lines:
        return parse(lines)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", nargs="+")
    parser.add_argument("--capacity", default="1M,2M,3M,5M,10M")
    parser.add_argument("--policy", default=",".join(FIXED))
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--remember", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.trace:
        requests = read(name)
        for capacity in map(parse_tokens, arguments.capacity.split(",")):
            rates, costs = {}, {}
            for policy in dict.fromkeys(["lru", *arguments.policy.split(",")]):
                begin = perf_counter()
                rates[policy] = replay(
                    requests, capacity=capacity, page_size=arguments.page_size, policy=policy
                ).hit_rate
                costs[policy] = round(1e3 * (perf_counter() - begin) / len(requests), 3)
            if arguments.remember:
                rates |= {each: remembering(requests, capacity, standing) for each, standing in POLICIES.items()}
            best, least = optimal(requests, capacity=capacity).hit_rate, rates["lru"]
            shares = {
                each: round(100 * (rate - least) / (best - least)) for each, rate in rates.items() if best > least
            }
            found = {"trace": Path(name).name, "capacity_tokens": capacity, "optimum": round(100 * best, 2)}
            found["hit_rate"] = {each: round(100 * rate, 2) for each, rate in rates.items()}
            print(json.dumps(found | {"share_of_distance": shares, "ms_a_request": costs}), flush=True)


if __name__ == "__main__":
    main()
