"""Hybrid models and tiers together: how long a context, how fast, with the hybrid layout off and on, by tiers.

    .venv/bin/python benchmarks/hybrid_tiers.py [--shapes gemma3] [--plan] [--json]

Shrunken Llama 4 Scout (three layers of chunks to a full one, experts) and Gemma 3 (five windows to a full layer) with
random weights and one budget of memory. For each layout (off: each kind has room for every token, as if all layers were
full; on: the kinds share an arena) and without tiers, with host memory, with a store behind less of it:

- the longest context, and what the planner says of the same budget;
- tokens a second of a prompt that nobody has, as long as the layout that holds least allows;
- seconds to the first token when it is gone on with after others took the device, and what was cached of it then;
- seconds between two tokens of its answer.

With `--plan`, from the planner, for Llama-4-Scout in bfloat16 on eight H100 and eight H200: how many requests of a
length fit at once, and how many prefixes of that length stay with twice as much on the host.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np

import rootcellar
from checkpoints import make_config
from rootcellar.plan.capacity import Ask, capacity
from rootcellar.plan.layers import read_architecture
from rootcellar.plan.presets import PRESETS
from tiers import processor

SHAPES = {
    "llama4": {"num_hidden_layers": 8, "attention_chunk_size": 512},
    "gemma3": {"num_hidden_layers": 12, "sliding_window": 64},
}
TIERS = ("none", "host", "host + file")
LAYOUTS = {"off": {"disable_kv_arena": True, "swa_full_tokens_ratio": 1.0}, "on": {}}
STEP = 512
"""Tokens of a prefill."""
QUESTION = 16
"""Tokens with which a prompt and its answer are gone on with."""
MACHINES = {"8xH100": 80 * 10**9, "8xH200": 141 * 10**9}
LENGTHS = (1_000_000, 2_500_000, 5_000_000, 10_000_000)
RATIO = 2.0


def measure(shape, memory, rounds, answer):
    """A row for each layout and tiers of a shape, whose engines take turns."""
    config = make_config(shape, **SHAPES[shape], max_position_embeddings=1 << 20, vocab_size=2048)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "config.json").write_text(json.dumps(config))
        found = {
            (layout, tiers): stack.enter_context(start(folder, layout, tiers, memory))
            for layout in LAYOUTS
            for tiers in TIERS
        }
        length = min(engine.total_tokens for engine in found.values()) - 2 * answer - QUESTION - 16
        rows = {each: {"cold": [], "back": [], "between": [], "cached": []} for each in found}
        for turn in range(rounds + 1):  # in the first, shapes are compiled
            for each, engine in found.items():
                run(engine, rows[each], length, answer, turn)
        return [
            {
                "shape": shape,
                "hybrid": layout,
                "tiers": tiers,
                "prompt": length,
                **capacities(found[layout, tiers], config),
                "prompt_tokens_per_second": length / statistics.median(row["cold"]),
                "first_token_seconds_when_back": statistics.median(row["back"]),
                "cached_when_back": statistics.median(row["cached"]),
                "between_tokens_seconds": statistics.median(row["between"]),
            }
            for (layout, tiers), row in rows.items()
        ]


def start(folder, layout, tiers, memory):
    """An engine."""
    pages = {"path": str(folder / f"pages-{layout}"), "min_free_space": 0, "prefetch_threshold": 64}
    host = {"enable_hierarchical_cache": True, "hicache_ratio": RATIO}
    store = {"hicache_storage_backend": "file", "hicache_storage_backend_extra_config": json.dumps(pages)}
    options = {"none": {}, "host": host, "host + file": {**host, "hicache_ratio": 1.0, **store}}[tiers]
    return rootcellar.Engine(
        model_path=str(folder), load_format="dummy", skip_tokenizer_init=True, device_memory=memory,
        chunked_prefill_size=STEP, max_running_requests=1, **LAYOUTS[layout], **options,
    )  # fmt: skip


def run(engine, row, length, answer, turn):
    """A prompt, as many others as the device holds, and the first with its answer and a question more."""
    random = np.random.default_rng(turn)
    first, question = (random.integers(0, 2048, count).tolist() for count in (length, QUESTION))
    cold = ask(engine, first, answer)
    for _ in range(1 + engine.total_tokens // length):
        ask(engine, random.integers(0, 2048, length).tolist(), 1)
    back = ask(engine, first + cold["output_ids"] + question, answer)
    if turn:
        row["cold"].append(cold["first_token_latency"])
        row["back"].append(back["first_token_latency"])
        row["cached"].append(back["cached_tokens"])
        row["between"] += [(m["e2e_latency"] - m["first_token_latency"]) / (answer - 1) for m in (cold, back)]


def ask(engine, prompt, most):
    sampling = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
    found = engine.generate(input_ids=prompt, sampling_params=sampling)
    engine._loop.call(engine._loop.machine.life.settle)
    return found["meta_info"] | {"output_ids": found["output_ids"]}


def capacities(engine, config):
    """The longest context that fits, and what the planner says of the same bytes."""
    report = engine.memory_report()
    ask = Ask(
        read_architecture(config), kv_bytes_per_device=report["available_kv_cache_bytes"],
        chunked_prefill_size=STEP, swa_full_tokens_ratio=1.0,
    )  # fmt: skip
    planned = capacity(ask)
    arena = "arena" in report["pools"]
    return {
        "longest": engine.total_tokens,
        "planned": planned.arena_longest_request if arena else planned.max_total_num_tokens,
    }


def plan():
    """The planner's table."""
    rows = []
    for machine, hbm in MACHINES.items():
        for length in LENGTHS:
            found = capacity(
                Ask(read_architecture(PRESETS["llama-4-scout"]), tp=8, devices=8, hbm=hbm, request_length=length,
                    hicache_ratio=RATIO)
            )  # fmt: skip
            rows.append(
                {"machine": machine, "length": length, "at_once_all_full": found.concurrency_all_full,
                 "at_once_hybrid": found.concurrency, "kept_all_full": found.concurrency_all_full * (1 + RATIO),
                 "kept_hybrid": found.concurrency * (1 + RATIO), "longest_all_full": found.max_total_num_tokens,
                 "longest_hybrid": found.arena_longest_request, "host_bytes_per_device": found.host_bytes_per_device}
            )  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--memory", default="64MB", help="Of the device, for weights, activations and KV cache.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {"measured": [row for s in args.shapes for row in measure(s, args.memory, args.rounds, args.answer)]}
    if args.plan:
        found["planned"] = plan()
    if args.json:
        print(json.dumps(found))
        return
    print(processor())
    for r in found["measured"]:
        print(
            f"{r['shape']}, hybrid {r['hybrid']}, {r['tiers']}: longest {r['longest']:,} (planned {r['planned']:,}); "
            f"{r['prompt']} tokens: {r['prompt_tokens_per_second']:.0f} tokens/s, back after "
            f"{r['first_token_seconds_when_back']:.2f} s with {r['cached_when_back']:.0f} cached, "
            f"{1000 * r['between_tokens_seconds']:.1f} ms between tokens"
        )
    for r in found.get("planned", ()):
        print(
            f"{r['machine']} {r['length'] / 1e6:g}M: at once {r['at_once_all_full']:.2f} all full, "
            f"{r['at_once_hybrid']:.2f} hybrid; kept {r['kept_all_full']:.2f}, {r['kept_hybrid']:.2f}; longest "
            f"{r['longest_all_full'] / 1e6:.1f}M, {r['longest_hybrid'] / 1e6:.1f}M"
        )


if __name__ == "__main__":
    main()
