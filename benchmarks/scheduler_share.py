"""What scheduling costs in a decode step of 64 requests, with the Python and with the native cache core.

    .venv/bin/python benchmarks/scheduler_share.py [--json]

The scheduler plans and advances steps over a real cache (a page of 1 and of 16 tokens, context 2,000), in turns on both
cores; its share is of a step that also runs a compiled forward pass (decode, batch 64, context 128) of a small model.
Medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median
from typing import Any

import jax
import numpy as np
from pool_size import CONFIG

from rootcellar.cache import Tier, full
from rootcellar.cache.radix import PyRadixCache
from rootcellar.models.config import read_config
from rootcellar.models.kinds import paging
from rootcellar.models.params import init_params
from rootcellar.ops.backends import choose_backend
from rootcellar.runner import Batch, BatchPart, Placement, Programs, Runner, Shapes, pools_of
from rootcellar.sampling_params import SamplingParams
from rootcellar.scheduler import Request, Scheduler

BATCH, CONTEXT = 64, 2000


def cores() -> dict[str, Any]:
    """The cores that are there."""
    try:
        from rootcellar.cache.native import NativeRadixCache
    except ImportError:
        print("the native core was not built: left out", file=sys.stderr)
        return {"python": PyRadixCache}
    return {"python": PyRadixCache, "native": NativeRadixCache}


def decoding(core: Any, page_size: int, steps: int) -> Scheduler:
    """A scheduler whose ``BATCH`` requests all decode."""
    tokens = BATCH * (CONTEXT + steps + page_size)
    cache = core([full("full")], page_size=page_size, capacity={("full", Tier.DEVICE): 2 * tokens}, max_leases=BATCH)
    scheduler = Scheduler(cache, chunked_prefill_size=BATCH * CONTEXT, max_running_requests=BATCH)
    rng = np.random.default_rng(0)
    for i in range(BATCH):
        prompt = rng.integers(0, 150_000, CONTEXT)
        scheduler.add(Request.new(f"{i}", prompt, SamplingParams(max_new_tokens=steps + 10)))
    plan = scheduler.plan()
    while not plan.decode or len(plan.chunks) < BATCH:
        scheduler.advance(plan, [[1]] * len(plan.chunks))
        plan = scheduler.plan()
    scheduler.advance(plan, [[1]] * BATCH)
    return scheduler


def step(scheduler: Scheduler) -> float:
    """Seconds to plan one decode step and to take its tokens."""
    began = time.perf_counter()
    plan = scheduler.plan()
    scheduler.advance(plan, [[1]] * BATCH)
    return time.perf_counter() - began


def forward_pass(steps: int) -> float:
    """Seconds of the compiled forward pass: decode, batch 64, context 128, pages of 16."""
    page, context = 16, 128
    cfg = read_config(CONFIG, {})
    pages, placement = paging(cfg, "float32", page, arena=False), Placement(cfg)
    backend = choose_backend("auto", pages.attended, "cpu")
    programs = Programs(placement, np.dtype(np.float32), pages, backend, Shapes(BATCH, 1, BATCH), context // page, 0)
    pools = pools_of(pages, placement, {"full": 2 * BATCH * context // page})
    runner = Runner(programs, placement.place(init_params(cfg, 0, np.float32)), pools)
    table = np.zeros((BATCH + 1, context // page), np.int32)
    table[1:] = 1 + np.arange(BATCH * context // page).reshape(BATCH, -1)
    batch = Batch.build([BatchPart(i + 1, context - 1, np.array([i])) for i in range(BATCH)], {"full": table}, 1)
    times = []
    for _ in range(steps + 3):
        began = time.perf_counter()
        jax.block_until_ready(runner.step(batch))
        times.append(time.perf_counter() - began)
    return median(times[3:])


def measure(steps: int) -> dict[str, Any]:
    forward = 1e6 * forward_pass(steps)
    result: dict[str, Any] = {"batch": BATCH, "forward_us": forward}
    for page_size in (1, 16):
        schedulers = {name: decoding(core, page_size, 4 * steps) for name, core in cores().items()}
        times: dict[str, list[float]] = {name: [] for name in schedulers}
        for _ in range(4 * steps):
            for name, scheduler in schedulers.items():
                times[name].append(step(scheduler))
        row = {name: 1e6 * median(seconds) for name, seconds in times.items()}
        shares = {f"{name}_share": us / (us + forward) for name, us in row.items()}
        result[f"page_size {page_size}"] = {f"{name}_us": us for name, us in row.items()} | shares
        if "native" in row:
            result[f"page_size {page_size}"]["times"] = row["python"] / row["native"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="forward passes to time; four times as many plans")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.steps)
    if args.json:
        print(json.dumps(result))
        return
    print(f"forward pass of {BATCH} requests: {result['forward_us']:.0f} us")
    for page_size in (1, 16):
        row = result[f"page_size {page_size}"]
        for name in ("python", "native"):
            if f"{name}_us" in row:
                us, share = row[f"{name}_us"], row[f"{name}_share"]
                print(f"page size {page_size:2}, {name} core: {us:.0f} us, {share:.1%} of a step")


if __name__ == "__main__":
    main()
