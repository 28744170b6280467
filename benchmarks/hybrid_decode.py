"""Decode speed of every kind of layer beside Hugging Face transformers, in one run, on tiny checkpoints.

    make test-reference            # once: sets up .venv-reference with torch and transformers
    .venv-reference/bin/python benchmarks/hybrid_decode.py [--json] [NAME ...]

The checkpoints are those of tests/golden: a few layers of random weights, float32, two threads each. For transformers
only the model's own decode steps with its own cache and an argmax are timed; ours is the whole engine. Both start from
a cache filled with the same prompts, take turns, and each figure is the median over the rounds. On models this small
overheads decide, and not arithmetic: it shows that no kind of layer is an afterthought, and no more than that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from engine_workers import Rootcellar, Transformers

from checkpoints import golden

THREADS = 2
CASES = {
    "llama2": "full attention",
    "mistral-window": "sliding window in all layers",
    "gemma3": "5 windows : 1 full",
    "gpt-oss": "window : full, sinks, experts",
    "bamba": "Mamba-2 : full",
    "qwen3-next": "3 gated delta : 1 full, experts",
    "llama4": "3 chunks : 1 full, experts",
    "deepseek2": "latent, experts in groups",
    "deepseek3": "latent, experts",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all, unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="decode steps timed in a round")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError:
        print("needs torch and transformers: run it with .venv-reference/bin/python", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)
    rows = []
    for name in args.names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            golden(name).make(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            ours = Rootcellar(Path(folder), args.page_size)
        with ours.engine:
            for batch in (1, 16):
                speed = compare(Transformers(model), ours, batch, args)
                rows.append({"name": name, "kinds": CASES[name], "batch": batch, **speed})
                rows[-1]["ratio"] = speed["rootcellar"] / speed["transformers"]
                if not args.json:
                    print(
                        f"{name:16s} {CASES[name]:30s} batch {batch:2d}: transformers {speed['transformers']:7.1f}, "
                        f"rootcellar {speed['rootcellar']:7.1f} tokens/s: {rows[-1]['ratio']:.2f}x",
                        flush=True,
                    )
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


def compare(theirs: Transformers, ours: Rootcellar, batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of each."""
    prompts = np.random.default_rng(batch).integers(0, 512, (batch, args.context))
    times: dict[str, list[float]] = {"transformers": [], "rootcellar": []}
    ours.fill(prompts)
    for turn in range(args.rounds + 1):
        theirs.fill(prompts)  # its windows and states cannot be taken back to where they were
        a, tokens_a = theirs.go_on(args.steps)
        b, tokens_b = ours.decode(args.steps)
        agree = np.mean(np.asarray(tokens_a) == np.asarray(tokens_b))
        if agree < 0.9:  # random weights have near ties; two different programs may part there
            raise SystemExit(f"the two disagree: {agree:.0%} of the tokens are equal")
        if turn:  # the first round warms up
            times["transformers"].append(a)
            times["rootcellar"].append(b)
    return {name: batch * args.steps / median(t) for name, t in times.items()}


if __name__ == "__main__":
    sys.exit(main())
