"""What an arena fits of a fixed budget, against pools that are split between the kinds.

    python benchmarks/arena_capacity.py [--json]

For each hybrid preset, at its true layers and spans: the longest request in an arena, under split pools and with all
layers full; and how many tokens of a mixed load (short and long requests, whose part of the tokens differs from wave to
wave) run at once in an arena and under the best static split. The real cache without the bytes: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace

from rootcellar.cache.kind import full
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.presets import PRESETS
from rootcellar.plan.sizing import Rules
from rootcellar.sim.mix import MemoryBudget, arena_cache, best_split, fitting_tokens, longest, mixed_load, split_cache

PAGE = 64
# Preset -> tokens that an all-full cache would hold, the step in tokens.
CASES = {"llama-4-scout": (400_000, 2048), "gemma-3-27b": (60_000, 512), "gpt-oss-120b": (60_000, 512)}
RATIOS = [2 ** (-i / 4) for i in range(33)]


def measure(name: str) -> dict[str, object]:
    tokens, step = CASES[name]
    groups = read_architecture(PRESETS[name]).groups
    layer_bytes = groups[0].token_bytes("bfloat16") // len(groups[0].kind.layers) * PAGE
    kinds = tuple(group.kind for group in groups)
    layers = sum(len(kind.layers) for kind in kinds)
    budget = MemoryBudget(kinds, layer_bytes, layers * layer_bytes * (tokens // PAGE + 1), Rules(PAGE, inflight=step))
    cache, division = arena_cache(budget)
    flat, _ = split_cache(replace(budget, kinds=(full("full", tuple(range(layers))),)))
    span = max(kind.span for kind in kinds)
    load = mixed_load(1, 12, (span // 2, 2 * span), (tokens // 16, tokens // 4))
    shared = fitting_tokens(cache, load, step)
    cache.check()
    ratio, split = best_split(budget, load, step, RATIOS)
    return {
        "model": name,
        "longest": longest(cache, step),
        "planned": division.tokens,
        "longest_all_full": longest(flat, step),
        "mixed_arena": shared,
        "mixed_best_split": split,
        "best_ratio": ratio,
        "gain": shared / split,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [measure(name) for name in CASES]
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'':16} {'longest':>10} {'planned':>10} {'all full':>10} {'times':>6}   mixed load: arena / best split")
    for row in rows:
        gain = row["longest"] / row["longest_all_full"]
        print(
            f"{row['model']:16} {row['longest']:>10,} {row['planned']:>10,} {row['longest_all_full']:>10,} "
            f"{gain:>6.2f}   {row['mixed_arena']:,} / {row['mixed_best_split']:,} = {row['gain']:.2f} "
            f"(ratio {row['best_ratio']:.3g}, 2^{math.log2(row['best_ratio']):.2f})"
        )


if __name__ == "__main__":
    main()
