"""Decode speed of every kind of layer beside Hugging Face transformers, in one run, on checkpoints of tests/golden.

    make test-reference            # once: sets up .venv-reference with torch and transformers
    .venv-reference/bin/python benchmarks/hybrid_decode.py [NAME ...] [--json]

Both read one checkpoint in float32, two threads each. For transformers only the model's own decode steps with its cache
and an argmax are timed; ours is the whole engine, from scheduling to sampling. The two take turns from a filled cache,
and each figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from checkpoints import golden  # noqa: E402

# One checkpoint for each kind of layer.
CASES = ("qwen2-4kv", "mistral-window", "gemma3", "gpt-oss", "llama4", "deepseek2", "deepseek3")


def their_decode(model, prompts: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
    """Seconds of ``steps`` decode steps after a prefill, and the tokens."""
    import torch

    with torch.inference_mode():
        out = model(torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
        cache, chosen = out.past_key_values, [out.logits[:, -1].argmax(-1, keepdim=True)]
        begin = time.perf_counter()
        for _ in range(steps):
            out = model(chosen[-1], past_key_values=cache, use_cache=True)
            chosen.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return time.perf_counter() - begin, torch.cat(chosen, 1).numpy()


def our_decode(engine, prompts: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
    """The same of the engine; the prompts come from its cache once it knows them."""
    settings = {"temperature": 0, "max_new_tokens": steps + 1, "ignore_eos": True}
    done = engine.generate(input_ids=prompts.tolist(), sampling_params=settings)
    first = max(r["meta_info"]["first_token_latency"] for r in done)
    last = max(r["meta_info"]["e2e_latency"] for r in done)
    return last - first, np.asarray([r["output_ids"] for r in done])


def compare(name: str, args: argparse.Namespace) -> list[dict]:
    import torch
    import transformers

    import rootcellar

    case, rows = golden(name), []
    with tempfile.TemporaryDirectory() as folder:
        case.make(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        engine = rootcellar.Engine(
            model_path=folder, skip_tokenizer_init=True, max_total_tokens=16 * 512, max_running_requests=16,
            compilation_cache_dir="off",
        )  # fmt: skip
    rng = np.random.default_rng(0)
    with engine:
        for batch in (1, 16):
            prompts = rng.integers(0, model.config.vocab_size, (batch, args.context))
            times: dict[str, list[float]] = {"transformers": [], "rootcellar": []}
            for turn in range(args.rounds + 1):
                theirs, their_tokens = their_decode(model, prompts, args.steps)
                ours, our_tokens = our_decode(engine, prompts, args.steps)
                agree = float(np.mean(their_tokens == our_tokens))
                if agree < 0.9:  # random weights have near ties; two different programs may part there
                    raise SystemExit(f"{name}: the two disagree: {agree:.0%} of the tokens are equal")
                if turn:  # the first round warms up
                    times["transformers"].append(theirs)
                    times["rootcellar"].append(ours)
            speed = {side: batch * args.steps / median(seconds) for side, seconds in times.items()}
            ratio = speed["rootcellar"] / speed["transformers"]
            rows.append({"name": name, "batch": batch, "context": args.context, **speed, "ratio": ratio})
            if not args.json:
                print(
                    f"{name:16s} batch {batch:2d}: transformers {speed['transformers']:7.1f}, "
                    f"rootcellar {speed['rootcellar']:7.1f} tokens/s: {ratio:.2f}x",
                    flush=True,
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=CASES, help=f"golden files; default: {' '.join(CASES)}")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed in a round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        print("needs torch and transformers: run it with .venv-reference/bin/python", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)
    rows = [row for name in args.names for row in compare(name, args)]
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
