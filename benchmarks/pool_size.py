"""A step costs the same whatever the pool's size.

    .venv/bin/python benchmarks/pool_size.py [--json]

Times the compiled step (decode at batch 1 and 16, context 128) over pools of 4,096 and 262,144 tokens, in turns, and
reads the temporary memory of both programs. The trap this guards against: XLA for CPUs copies the whole pool in every
step when a scatter of one update becomes a dynamic-update-slice in several consumers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median

import jax
import numpy as np

from rootcellar.models.config import read_config
from rootcellar.models.kinds import paging
from rootcellar.models.params import init_params
from rootcellar.ops.backends import choose_backend
from rootcellar.runner import Batch, BatchPart, Placement, Programs, Runner, Shapes, pools_of

SIZES = (4096, 262144)
PAGE = 16
CONTEXT = 128
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cfg = read_config(CONFIG, {})
    placement, pages = Placement(cfg), paging(cfg, "float32", PAGE, arena=False)
    params = placement.place(init_params(cfg, 0, np.float32))
    rows = []
    for wanted in ("xla", "native"):
        if choose_backend("auto" if wanted == "native" else wanted, pages.attended, "cpu") != wanted:
            print("the native backend was not built: left out", file=sys.stderr)
            continue
        programs = Programs(placement, np.dtype(np.float32), pages, wanted, Shapes(16, 1, 16), 256, 0)
        runners = {size: Runner(programs, params, pools_of(pages, placement, {"full": size // PAGE})) for size in SIZES}
        for batch in (1, 16):
            rows.append(compare(wanted, runners, batch, args.rounds))
            if not args.json:
                r = rows[-1]
                print(
                    f"{wanted:6s} batch {batch:2d}: {r['milliseconds'][0]:.2f} ms at {SIZES[0]:,} tokens, "
                    f"{r['milliseconds'][1]:.2f} ms at {SIZES[1]:,}: {r['ratio']:.2f}x; "
                    f"temporary memory {r['temporary_bytes'][0]:,} and {r['temporary_bytes'][1]:,} bytes"
                )
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


def compare(backend: str, runners: dict[int, Runner], batch: int, rounds: int) -> dict:
    batches = {}
    for size, runner in runners.items():
        pages = np.random.default_rng(0).permutation(np.arange(1, size // PAGE + 1))
        table = np.zeros((batch + 1, 256), np.int32)
        table[1:, : CONTEXT // PAGE] = pages[: batch * CONTEXT // PAGE].reshape(batch, -1)
        parts = [BatchPart(i + 1, CONTEXT - 1, np.array([i])) for i in range(batch)]
        batches[size] = Batch.build(parts, {"full": table}, 1)
        jax.block_until_ready(runner.step(batches[size]))
    times: dict[int, list[float]] = {size: [] for size in runners}
    for _ in range(rounds):
        for size, runner in runners.items():
            begin = time.perf_counter()
            jax.block_until_ready(runner.step(batches[size]))
            times[size].append(time.perf_counter() - begin)
    small, large = (median(times[size]) for size in SIZES)
    return {
        "backend": backend,
        "batch": batch,
        "pool_tokens": list(SIZES),
        "milliseconds": [small * 1e3, large * 1e3],
        "ratio": large / small,
        "temporary_bytes": [runners[size].temporary_bytes(batches[size]) for size in SIZES],
    }


if __name__ == "__main__":
    sys.exit(main())
