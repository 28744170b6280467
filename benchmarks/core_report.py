"""What ``cache_core.py`` prints: a line a row as it is measured, and the ratios that they add up to at the end."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

Result = dict[str, Any]
SGLANG = ("sglang-rust", "sglang-python")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}


def median(result: Result, side: str) -> float | None:
    return result["sides"].get(side, {}).get("median")


def best(result: Result, sides: tuple[str, ...]) -> float | None:
    """The best of some sides: most requests, or least time or memory."""
    found = [value for side in sides if (value := median(result, side))]
    if not found:
        return None
    return max(found) if result["unit"] == "requests/s" else min(found)


def ratio(result: Result, ours: str, theirs: tuple[str, ...]) -> float | None:
    """How many times better ``ours`` is than the best of ``theirs``."""
    mine, other = median(result, ours), best(result, theirs)
    if not mine or not other:
        return None
    return mine / other if result["unit"] == "requests/s" else other / mine


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(result: Result) -> None:
    """One row: every side's median, its hit rate where there is one, and why a side is missing."""
    page = f"page {result['page_size']}" if result["page_size"] else ""
    words = []
    for side, found in result["sides"].items():
        if "median" in found:
            hits = f" ({found['hit_rate']:.2%} hit)" if "hit_rate" in found else ""
            words.append(f"{side} {number(found['median'])}{hits}")
        elif "error" in found:
            words.append(f"{side} failed: {found['error']}")
    ours = next(iter(result["sides"]))
    times = [
        f"{who} {against:.3g}x"
        for who, theirs in (("SGLang", SGLANG), ("vLLM", ("vllm",)))
        if (against := ratio(result, ours, theirs)) is not None
    ]
    line = f"{result['row']:<48} {page:<8} {result['unit']:<10} " + " | ".join(words)
    print(line + (f" || against {', '.join(times)}" if times else ""), flush=True)


def slot_bytes(results: list[Result]) -> dict[int, int]:
    """Bytes of the slots of the key that the rows of one node matched, by page size."""
    return {
        result["page_size"]: found["bytes"]
        for result in results
        if result.get("nodes") == 1
        for found in list(result["sides"].values())[:1]
        if "bytes" in found
    }


def summary(results: list[Result]) -> None:
    """The distance to the floor, and memory by token and node."""
    floor(results)
    rows = [result for result in results if "entry" in result]
    for side in rows[0]["sides"] if rows else ():
        few, many = (result["sides"][side] for result in rows)
        if "bytes" not in few or "bytes" not in many:
            continue
        apart = many["nodes"] - few["nodes"]  # of blocks there are as many whatever the entries
        node = (many["bytes"] - few["bytes"]) / apart if apart else 0.0
        token = (few["bytes"] - node * few["nodes"]) / rows[0]["tokens_cached"]
        own = f"; by its own account {many['own'] / 2**20:.1f} MiB" if "own" in many else ""
        print(f"memory, {side}: {token:.1f} bytes per cached token, {node:.0f} per node{own}")


def floor(results: list[Result]) -> None:
    parts = {(r["page_size"], r["what"]): best(r, tuple(r["sides"])) for r in results if "what" in r and "size" in r}
    call = parts.get((0, "call"))
    for result in results:
        compare, copy = (parts.get((result["page_size"], what)) for what in ("memcmp", "memcpy"))
        if result.get("nodes") != 1 or call is None or compare is None or copy is None:
            continue
        ours = next(iter(result["sides"]))
        mine = median(result, ours)
        if mine is not None:
            compare, copy = compare - call, copy - call  # both were timed inside an empty function
            print(
                f"floor, page {result['page_size']}: memcmp {compare:.2f} us, memcpy {copy:.2f} us, an empty call "
                f"{call:.3f} us; {ours}'s match of one node {mine:.2f} us = "
                f"{(mine - call) / (compare + copy):.2f} times the two, plus the call"
            )


def show_counts(counts: dict[str, int], as_json: bool) -> None:
    """Instructions of each workload."""
    if as_json:
        print(json.dumps({"python": platform.python_version(), "instructions": counts}, indent=1))
        return
    for name, count in counts.items():
        print(f"{name:<48} {count:>12,} instructions")
    if not counts:
        print("nothing counted", file=sys.stderr)
