"""What the states of recurrent layers take in a decode step on a CPU, beside what memory takes for their bytes.

    python benchmarks/recurrent_decode.py [--rows 1,4,16] [--layers 8] [--rounds 15] [--json]

Layers of 16 heads with states of 128 x 128 (Qwen3.5's smaller models, or Mamba-2 in one group), one after another over
pools of their own. ``kernel``: where states lie (``ops/native/states.h``), and ``guessed``: the same where all rows
follow the first; ``xla``: gathered, computed and scattered, and ``verified``: as XLA takes rows of which some may
follow others, though none does. ``memory``: one pass that reads and writes as many bytes in place. They take turns;
of each way the median time of a layer is printed, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rootcellar.ops.delta import gated_delta
from rootcellar.ops.recurrent import StatesInPlace, course, in_order
from rootcellar.ops.ssd import ssd
from rootcellar.ops.states import in_states

HEADS, SIZE = 16, 128


def delta(pool: jax.Array, x: jax.Array, way: Any, in_place: StatesInPlace | None) -> tuple[jax.Array, jax.Array]:
    rates = x[:, :, 0]
    return gated_delta(pool, x, x, x, -jnp.abs(rates), jax.nn.sigmoid(rates), way, in_place)


def mamba(pool: jax.Array, x: jax.Array, way: Any, in_place: StatesInPlace | None) -> tuple[jax.Array, jax.Array]:
    return ssd(pool, x, jnp.abs(x[:, :, 0]), -jnp.ones(HEADS), x[:, :1], x[:, 1:2], way, in_place)


def step(rule: Callable[..., Any], in_place: StatesInPlace | None) -> Callable[..., Any]:
    """All layers: ``(pools, x [rows, HEADS, SIZE], tables) -> (pools, x)``, compiled."""

    def run(pools: list[jax.Array], x: jax.Array, tables: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        rows = jnp.arange(len(x), dtype=jnp.int32)
        way, after = course(tables, rows, jnp.full(len(x), 7)), []
        for pool in pools:
            y, new = rule(pool, x, way, in_place)
            x = jnp.tanh(x + 0.1 * y)  # stays small, however many steps
            after.append(new)
        return after, x

    return jax.jit(run, donate_argnums=0)


def measure(rule: Callable[..., Any], rows: int, layers: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a layer, by way."""
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, HEADS, SIZE)), jnp.float32)
    own = np.arange(1, rows + 1, dtype=np.int32)
    apart, chain = np.stack([own, own], 1), np.stack([np.maximum(own - 1, 1), own], 1)
    ways = {
        "kernel": (step(rule, in_states), apart),
        "guessed": (step(rule, in_states), chain),
        "xla": (step(rule, None), apart),
        "verified": (step(rule, in_order), apart),
    }
    pools = [jnp.zeros((rows + 1, HEADS, SIZE, SIZE)) for _ in range(layers)]
    bytes_of_all = [jnp.ones((rows, HEADS, SIZE, SIZE)) for _ in range(layers)]
    scale = jax.jit(lambda arrays: [0.999 * a for a in arrays], donate_argnums=0)
    times: dict[str, list[float]] = {name: [] for name in (*ways, "memory")}
    for turn in range(rounds + 2):
        for name, (run, tables) in ways.items():
            start = time.perf_counter()
            pools, out = jax.block_until_ready(run(pools, x, tables))
            times[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        bytes_of_all = jax.block_until_ready(scale(bytes_of_all))
        times["memory"].append(time.perf_counter() - start)
        assert np.isfinite(out).all(), turn
    return {name: 1e3 * median(each[2:]) / layers for name, each in times.items()}  # the first two compile and warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = []
    for name, rule in (("gated delta", delta), ("Mamba-2", mamba)):
        for rows in map(int, args.rows.split(",")):
            took = measure(rule, rows, args.layers, args.rounds)
            moved = 2 * 4 * rows * HEADS * SIZE * SIZE
            found.append({"rule": name, "rows": rows, "ms": took, "gb_per_s": moved / took["kernel"] / 1e6})
            if not args.json:
                shown = "  ".join(f"{way} {ms:.3f}" for way, ms in took.items())
                print(f"{name:12s} {rows:3d} rows: {shown} ms a layer; {found[-1]['gb_per_s']:.1f} GB/s", flush=True)
    if args.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
