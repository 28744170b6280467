"""The cache core, without a model: requests a second, the cost of evicting and allocating, beside SGLang's.

    python benchmarks/cache_core.py --trace TRACE [--sglang WHEEL_FOLDER --peer-python PYTHON]

The peer is optional: an unpacked SGLang wheel (``pip download --no-deps sglang==0.5.23``, unzip) and an interpreter
with torch. Without it, or without the trace, the parts that need them are left out with a message.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rootcellar.cache import Found, Key, RadixCache, SlotAllocator, Tier, full
from rootcellar.cache.evict import make_room
from rootcellar.sim.trace import parse

REQUESTS, CAPACITY = 3000, 2_000_000


def serve(keys: list[Key], page_size: int, policy: str) -> dict[str, float]:
    """Requests a second of match + open + grow (evicting) + commit + close, one request at a time."""
    longest = max(map(len, keys))
    cache = RadixCache(
        [full("full")],
        page_size=page_size,
        capacity={("full", Tier.DEVICE): CAPACITY},
        max_leases=1,
        max_length=longest,
        policy=policy,
    )
    begin = time.perf_counter()
    for key in keys:
        lease = cache.open(cache.match(key))
        cache.grow(lease, len(key) - lease.length)
        cache.commit(lease, key)
        cache.close(lease)
    seconds = time.perf_counter() - begin
    return {"requests_per_second": len(keys) / seconds, "hit_rate": cache.stats().hit_rate, "page_size": page_size}


def peer(arguments: argparse.Namespace, page_size: int) -> dict[str, float] | None:
    """The same requests through SGLang's core, in its own process; None when it is not there."""
    if not arguments.sglang:
        return None
    script = Path(__file__).with_name("peer_sglang.py")
    words = [arguments.peer_python, script, arguments.sglang, arguments.trace, page_size, REQUESTS, CAPACITY]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"peer left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def trace_part(arguments: argparse.Namespace) -> dict[str, object]:
    with open(arguments.trace, encoding="utf-8") as lines:
        requests, _ = parse(itertools.islice(lines, REQUESTS))
    keys = [request.key() for request in requests]
    results: dict[str, object] = {}
    for page_size in (1, 64):
        # Interleaved, so that both see the same load of the machine; the best of each counts.
        ours, theirs = [], []
        for _ in range(arguments.rounds):
            ours.append(serve(keys, page_size, "lru"))
            theirs.append(peer(arguments, page_size))
        best = max(ours, key=lambda row: row["requests_per_second"])
        row: dict[str, object] = {"rootcellar": best, "adaptive": serve(keys, page_size, "adaptive")}
        found = [row for row in theirs if row]
        if found:
            row["sglang"] = max(found, key=lambda row: row["requests_per_second"])
            row["times"] = best["requests_per_second"] / row["sglang"]["requests_per_second"]
        results[f"page_size {page_size}"] = row
    return results


def median_microseconds(action, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def evict_part() -> dict[str, float]:
    """Microseconds to evict one leaf among many."""
    costs = {}
    for leaves in (1_000, 10_000, 100_000):
        sizes = {("full", Tier.DEVICE): leaves, ("full", Tier.STORAGE): leaves}
        cache = RadixCache([full("full")], page_size=1, capacity=sizes, max_leases=1, max_length=4)
        for i in range(leaves):
            cache.learn(Found(Key([i]), Tier.STORAGE))
        tree = cache._tree
        shelf = next(shelf for shelf in tree.shelves if shelf.tier is Tier.STORAGE)
        evict = lambda tree=tree, shelf=shelf: make_room(tree, shelf, shelf.slots.free_pages + 1)  # noqa: E731
        costs[f"{leaves} leaves"] = median_microseconds(evict, 500)
    return costs


def slot_part() -> dict[str, float]:
    """Microseconds to take and give back one slot."""
    costs = {}
    for size in (20_000, 2_000_000, 20_000_000):
        slots = SlotAllocator(size, 1)
        costs[f"{size} tokens"] = median_microseconds(lambda slots=slots: slots.give(slots.take(1)), 5000)
    return costs


def decode_part() -> dict[str, float]:
    """Microseconds for the slots of one decode step of 256 requests."""
    costs = {}
    for page_size in (1, 16, 64):
        sizes = {("full", Tier.DEVICE): 1 << 19}
        cache = RadixCache([full("full")], page_size=page_size, capacity=sizes, max_length=4096)
        leases = [cache.open(cache.match(Key([i]))) for i in range(256)]
        grow = lambda cache=cache, leases=leases: cache.grow_many(leases)  # noqa: E731
        times = []
        for _ in range(1000):
            begin = time.perf_counter()
            grow()
            times.append(time.perf_counter() - begin)
        costs[f"page_size {page_size}"] = 1e6 * statistics.mean(times)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", default=os.environ.get("ROOTCELLAR_TRACE"), help="Mooncake's conversation trace")
    parser.add_argument("--sglang", help="folder of an unpacked SGLang wheel")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with torch, for the peer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, object] = {
        "evict one leaf, us": evict_part(),
        "take and give one slot, us": slot_part(),
        "decode step of 256, us": decode_part(),
    }
    if arguments.trace:
        results["first 3000 requests of the trace, 2M tokens"] = trace_part(arguments)
    else:
        print("trace part left out: give --trace or set ROOTCELLAR_TRACE", file=sys.stderr)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
