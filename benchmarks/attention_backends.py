"""The two attention backends against each other, by shape: what `attention_backend=auto` should take.

    .venv/bin/python benchmarks/attention_backends.py [--json]

Times one layer's attention over a paged pool, both backends in turns: decoding (1, 4 and 16 rows) and chunks of prefill
(64 and 512 tokens in tiles of 16), at several contexts, for several shapes of heads, a window, and latents. Ratios
above 1 mean that native is faster. The last line says where `auto` is furthest behind the better of the two; by more
than a tenth, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from statistics import median

import jax
import numpy as np

from rootcellar.ops import kernels
from rootcellar.ops.backends import Reach, attention, choose_backend
from rootcellar.plan.stored import Heads, Latents
from rootcellar.pools.layouts import TokenLayout, layout_of
from rootcellar.runner import Batch, BatchPart

PAGE = 16
CONTEXTS = (512, 1280, 4096)
BACKENDS = ("native", "xla")


@dataclass(frozen=True)
class Case:
    """A layer: so many query heads over what is stored, all of it or the last ``window`` tokens (0: all)."""

    heads: int
    stored: Heads | Latents
    window: int = 0

    def __str__(self) -> str:
        kept = self.stored
        wide = f"{kept.kv_heads}/{kept.head_dim}" if isinstance(kept, Heads) else f"latents/{kept.rank + kept.rope_dim}"
        return f"{self.heads}/{wide}{f' window {self.window}' if self.window else ''}"

    @property
    def reach(self) -> Reach:
        """What a query sees."""
        return Reach("sliding_window", self.window, 0.1) if self.window else Reach(scale=0.1)


CASES = (
    Case(4, Heads(2, 64)),
    Case(9, Heads(3, 64)),
    Case(14, Heads(2, 64)),
    Case(16, Heads(4, 128)),
    Case(16, Heads(16, 128)),
    Case(16, Heads(4, 128), 512),
    Case(16, Latents(512, 64)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the first shape and context alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if kernels.built() is None:
        print("there is no native backend to compare: it was not built, or this is no CPU for it", file=sys.stderr)
        return 1
    rows = []
    for case in CASES[:1] if args.quick else CASES:
        layout = layout_of(case.stored, "float32", PAGE)
        auto = choose_backend("auto", [layout], jax.default_backend())
        for context in CONTEXTS[:1] if args.quick else CONTEXTS:
            for name, parts, tile in shapes(context):
                times = compare(case, layout, parts, tile, context, args.rounds)
                # Medians of ratios of neighbours: what disturbs the machine disturbs both.
                ratio = median(x / n for n, x in zip(times["native"], times["xla"], strict=True))
                row = {
                    "layer": str(case),
                    "context": context,
                    "shape": name,
                    "milliseconds": {backend: median(times[backend]) * 1e3 for backend in BACKENDS},
                    "ratio": ratio,
                    "auto": auto,
                    "auto_behind": max(1 / ratio if auto == "native" else ratio, 1.0) - 1,
                }
                rows.append(row)
                if not args.json:
                    took = ", ".join(f"{backend} {median(times[backend]) * 1e3:8.3f} ms" for backend in BACKENDS)
                    print(f"{case!s:>19s} context {context:5d} {name:11s}: {took}: {ratio:5.2f}x", flush=True)
    worst = max(rows, key=lambda row: row["auto_behind"])
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        where = f"{worst['layer']} at {worst['context']}, {worst['shape']}"
        print(f"auto is at most {worst['auto_behind']:.0%} behind the better backend ({where})")
    return int(worst["auto_behind"] > 0.1)


def shapes(context: int) -> list[tuple[str, list[BatchPart], int]]:
    """Name, parts and tile of each batch that is timed; the last position of each is ``context - 1``."""
    one = np.zeros(1, np.int32)
    return [
        ("decode 1", [BatchPart(1, context - 1, one)], 1),
        ("decode 4", [BatchPart(row + 1, context - 1, one) for row in range(4)], 1),
        ("decode 16", [BatchPart(row + 1, context - 1, one) for row in range(16)], 1),
        ("prefill 64", [BatchPart(1, context - 64, np.zeros(64, np.int32))], 16),
        ("prefill 512", [BatchPart(1, context - 512, np.zeros(512, np.int32))], 16),
    ]


def compare(
    case: Case, layout: TokenLayout, parts: list[BatchPart], tile: int, context: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round of both backends."""
    random = np.random.default_rng(0)
    width = context // PAGE
    pages = random.permutation(np.arange(1, len(parts) * width + 1))
    table = np.zeros((len(parts) + 1, width), np.int32)
    table[1:] = pages.reshape(len(parts), width)
    batch = Batch.build(parts, {"full": table}, tile)
    (buffer,) = layout.buffers(len(pages) + 1)
    dim, tokens = buffer.shape[-1], len(batch.positions)
    stored = [(buffer.shape[2], dim)] * 2 if isinstance(case.stored, Heads) else [(dim,)]
    new = [random.standard_normal((tokens, *shape), np.float32) for shape in [(case.heads, dim), *stored]]
    if isinstance(case.stored, Heads):
        new.append(np.full(case.heads, -np.inf, np.float32))  # sinks
    held = random.standard_normal(buffer.shape, np.float32)
    rest = jax.device_put((*new, batch.tables["full"], batch.rows, batch.positions))
    steps = {b: jax.jit(attention(b, layout, case.reach), donate_argnums=len(rest)) for b in BACKENDS}
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
