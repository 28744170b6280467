"""The two attention backends against each other, by shape: what `attention_backend=auto` should take.

    .venv/bin/python benchmarks/attention_backends.py [--json]

Times one layer's attention over a paged pool, both backends in turns: decoding (1 and 16 rows) and a chunk of prefill
(512 tokens in tiles of 16), at several contexts and shapes of heads. Ratios above 1 mean that native is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median

import jax
import numpy as np

from rootcellar.ops.backends import Reach, attention, native
from rootcellar.pools.layouts import PagedHeads
from rootcellar.runner import Batch, BatchPart

PAGE = 16
CHUNK = 512
HEADS = ((4, 2, 64), (14, 2, 64), (16, 4, 128))  # queries, keys and values, head_dim
CONTEXTS = (512, 1280, 4096)
BACKENDS = ("native", "xla")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the first shape and context alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if native.kernel() is None:
        print("there is no native backend to compare: it was not built, or this is no CPU for it", file=sys.stderr)
        return 1
    rows = []
    for heads in HEADS[:1] if args.quick else HEADS:
        for context in CONTEXTS[:1] if args.quick else CONTEXTS:
            for name, parts, tile in shapes(context):
                times = compare(heads, parts, tile, context, args.rounds)
                rows.append(
                    {
                        "heads": heads,
                        "context": context,
                        "shape": name,
                        "milliseconds": {backend: median(times[backend]) * 1e3 for backend in BACKENDS},
                        # Medians of ratios of neighbours: what disturbs the machine disturbs both.
                        "ratio": median(x / n for n, x in zip(times["native"], times["xla"], strict=True)),
                    }
                )
                if not args.json:
                    row = rows[-1]
                    print(
                        f"{'/'.join(map(str, heads)):>9s} context {context:5d} {name:10s}: "
                        f"native {row['milliseconds']['native']:8.3f} ms, xla {row['milliseconds']['xla']:8.3f} ms: "
                        f"{row['ratio']:5.2f}x"
                    )
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


def shapes(context: int) -> list[tuple[str, list[BatchPart], int]]:
    """Name, parts and tile of each batch that is timed; the last position of each is ``context - 1``."""
    one = np.zeros(1, np.int32)
    return [
        ("decode 1", [BatchPart(1, context - 1, one)], 1),
        ("decode 16", [BatchPart(row + 1, context - 1, one) for row in range(16)], 1),
        ("prefill", [BatchPart(1, context - CHUNK, np.zeros(CHUNK, np.int32))], 16),
    ]


def compare(
    heads: tuple[int, int, int], parts: list[BatchPart], tile: int, context: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round of both backends."""
    queries, pairs, dim = heads
    random = np.random.default_rng(0)
    width = context // PAGE
    pages = random.permutation(np.arange(1, len(parts) * width + 1))
    table = np.zeros((len(parts) + 1, width), np.int32)
    table[1:] = pages.reshape(len(parts), width)
    batch = Batch.build(parts, {"full": table}, tile)
    tokens = len(batch.positions)
    q, k, v = (random.standard_normal((tokens, count, dim), np.float32) for count in (queries, pairs, pairs))
    held = random.standard_normal((len(pages) + 1, 2, pairs, PAGE, dim), np.float32)
    rest = jax.device_put(
        (q, k, v, np.full(queries, -np.inf, np.float32), batch.tables["full"], batch.rows, batch.positions)
    )
    layout = PagedHeads(pairs, dim, np.dtype(np.float32), PAGE)
    steps = {b: jax.jit(attention(b, layout, Reach(scale=dim**-0.5)), donate_argnums=7) for b in BACKENDS}
    pools = {backend: jax.device_put(held) for backend in BACKENDS}
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for i in range(rounds + 1):  # the first compiles
        for backend in BACKENDS if i % 2 else BACKENDS[::-1]:
            begin = time.perf_counter()
            _, pools[backend] = jax.block_until_ready(steps[backend](*rest, pools[backend]))
            if i:
                times[backend].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    sys.exit(main())
