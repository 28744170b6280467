"""LFU and SLRU with a perfect memory, as yardsticks for ``adaptive`` on a trace.

    python benchmarks/cache_policies.py TRACE [--capacity 1M,2M,3M,5M,10M]

The policies of the cache count uses while content is resident. These count every use of every block ever seen, which no
real cache can, and evict leaf first, block by block. Prints hit rates in percent by capacity.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from heapq import heappop, heappush

from rootcellar.commands.replay import parse_tokens
from rootcellar.sim.replay import replay
from rootcellar.sim.trace import BLOCK, TraceRequest, parse

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace")
    parser.add_argument("--capacity", default="1M,2M,3M,5M,10M")
    arguments = parser.parse_args()
    with open(arguments.trace, encoding="utf-8") as lines:
        requests, _ = parse(lines)
    for capacity in map(parse_tokens, arguments.capacity.split(",")):
        rates = {name: remembering(requests, capacity, standing) for name, standing in POLICIES.items()}
        rates["adaptive"] = replay(requests, capacity=capacity, policy="adaptive").hit_rate
        print(json.dumps({"capacity_tokens": capacity} | {name: round(100 * rate, 2) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()
