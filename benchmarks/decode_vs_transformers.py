"""Decode speed and time to first token beside Hugging Face transformers, in one run.

    make test-reference            # once: sets up .venv-reference with torch and transformers
    .venv-reference/bin/python benchmarks/decode_vs_transformers.py [--json]

Both read one checkpoint: a Qwen2 of 100 million random parameters (hidden 768, 12 layers, 12 heads, 4 KV heads,
vocabulary 16,000, untied), float32, two threads each. For transformers only the model's own decode steps with a growing
DynamicCache and an argmax are timed; ours is the whole engine: scheduling, sampling, detokenisation left out only
because the checkpoint has no tokenizer. Both start from a filled cache, take turns, and each figure is the median over
the rounds.
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

FRESH = 16
LONG = 2000


def make_model(folder: Path):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).to(torch.float32).eval()
    model.save_pretrained(folder)
    return model


class Transformers:
    """Decode with a filled cache: the model's forward and an argmax."""

    def __init__(self, model):
        self.model = model

    def fill(self, prompts: np.ndarray) -> None:
        import torch

        with torch.inference_mode():
            out = self.model(torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
        self.cache, self.first, self.context = out.past_key_values, out.logits[:, -1:], prompts.shape[1]

    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        if grown := self.cache.get_seq_length() - self.context:
            self.cache.crop(-grown)  # transformers 5: what to take off the end
        return self.go_on(steps)

    def go_on(self, steps: int) -> tuple[float, list[list[int]]]:
        import torch

        with torch.inference_mode():
            token = self.first.argmax(-1)
            chosen = [token]
            begin = time.perf_counter()
            for at in range(self.context, self.context + steps):
                # The position outright: models whose first layer is recurrent would count from zero.
                position = torch.full_like(token, at)
                out = self.model(token, past_key_values=self.cache, use_cache=True, position_ids=position)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(token)
            seconds = time.perf_counter() - begin
        return seconds, torch.cat(chosen, 1).tolist()


class Rootcellar:
    """The engine, end to end."""

    def __init__(self, folder: Path, page_size: int):
        import rootcellar

        self.engine = rootcellar.Engine(
            model_path=folder,
            skip_tokenizer_init=True,
            max_total_tokens=16 * 2304,
            max_running_requests=16,
            page_size=page_size,
            compilation_cache_dir="off",
        )

    def run(self, prompts: list[list[int]], count: int) -> list[dict]:
        settings = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        return self.engine.generate(input_ids=prompts, sampling_params=settings)

    def fill(self, prompts: np.ndarray) -> None:
        self.engine.flush_cache()
        self.rows = prompts.tolist()
        self.run(self.rows, 1)

    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        done = self.run(self.rows, steps + 1)
        begin = max(r["meta_info"]["first_token_latency"] for r in done)
        seconds = max(r["meta_info"]["e2e_latency"] for r in done) - begin
        return seconds, [r["output_ids"] for r in done]

    def first_token(self, prompt: list[int]) -> tuple[float, float]:
        self.engine.flush_cache()
        changed = [*prompt[:-FRESH], *((t + 1) % 16000 for t in prompt[-FRESH:])]
        cold, cached = (self.run([p], 1)[0]["meta_info"]["first_token_latency"] for p in (prompt, changed))
        return cold, cached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decode steps timed in a round")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        print("needs torch and transformers: run it with .venv-reference/bin/python", file=sys.stderr)
        return 2
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = Transformers(make_model(Path(folder)))
        ours = Rootcellar(Path(folder), args.page_size)
    result = {"page_size": args.page_size, "attention_backend": ours.engine.attention_backend, "decode": []}
    with ours.engine:
        for context in (128, 2048):
            for batch in (1, 16):
                times: dict[str, list[float]] = {"transformers": [], "rootcellar": []}
                prompts = rng.integers(0, 16000, (batch, context))
                theirs.fill(prompts)
                ours.fill(prompts)
                for turn in range(args.rounds + 1):
                    a, tokens_a = theirs.decode(args.steps)
                    b, tokens_b = ours.decode(args.steps)
                    agree = np.mean(np.asarray(tokens_a) == np.asarray(tokens_b))
                    if agree < 0.9:  # random weights have near ties; two different programs may part there
                        raise SystemExit(f"the two disagree: {agree:.0%} of the tokens are equal")
                    if turn:  # the first round warms up
                        times["transformers"].append(a)
                        times["rootcellar"].append(b)
                speed = {name: batch * args.steps / median(t) for name, t in times.items()}
                row = {
                    "context": context,
                    "batch": batch,
                    **speed,
                    "ratio": speed["rootcellar"] / speed["transformers"],
                }
                result["decode"].append(row)
                if not args.json:
                    print(
                        f"decode, context {context:5d}, batch {batch:2d}: transformers {speed['transformers']:7.1f}, "
                        f"rootcellar {speed['rootcellar']:7.1f} tokens/s: {row['ratio']:.2f}x",
                        flush=True,
                    )
        pairs = [ours.first_token(rng.integers(0, 16000, LONG).tolist()) for _ in range(args.rounds + 1)][1:]
    cold, cached = (median(x) for x in zip(*pairs, strict=True))
    result["first_token"] = {"prompt": LONG, "cold": cold, "cached": cached, "ratio": cached / cold}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"first token of {LONG}: {cold * 1e3:.0f} ms cold, {cached * 1e3:.0f} ms cached: {cached / cold:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
