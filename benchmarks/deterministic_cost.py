"""What ``enable_deterministic_inference`` costs: two engines of one process, with it and without, in turns.

    .venv/bin/python benchmarks/deterministic_cost.py [--model-path demo] [--batches 16,1] [--rounds 30] [--json]

In each round both engines read prompts of 120 tokens that nothing is known of, and then continue the same prompts, by
then cached, by 1 token and by 97: the difference is 96 steps of decoding. Who comes first alternates. Shown are medians
of tokens/s and of the ratios of the rounds' times, since a machine's speed changes from round to round: of 30 rounds on
a virtual machine of two threads that is known to 5 %. Exit status 1 where decoding at batch 16 costs more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import numpy as np

import rootcellar

PROMPT, STEPS, BAR = 120, 96, 1.05


def call(engine: rootcellar.Engine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds in which each of ``prompts`` is continued by ``tokens`` tokens, drawn at temperature 1."""
    drawn = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    began = time.perf_counter()
    settings = [{**drawn, "seed": i} for i in range(len(prompts))]
    engine.generate(input_ids=prompts, sampling_params=settings, return_logprob=True, return_text_in_logprobs=False)
    return time.perf_counter() - began


def measure(engine: rootcellar.Engine, prompts: list[list[int]]) -> tuple[float, float]:
    """Seconds of reading ``prompts``, which are new, and of decoding ``STEPS`` steps after them."""
    reading = call(engine, prompts, 1)
    return reading, call(engine, prompts, 1 + STEPS) - call(engine, prompts, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--batches", default="16,1")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    common = {"model_path": args.model_path, "max_total_tokens": 8192, "max_running_requests": 16, "page_size": 16}
    engines = {
        fixed: rootcellar.Engine(**common, enable_deterministic_inference=fixed, skip_tokenizer_init=True)
        for fixed in (False, True)
    }
    found, good = [], True
    for batch in map(int, args.batches.split(",")):
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for turn in range(args.rounds + 1):
            prompts = [random.integers(5, 500, PROMPT).tolist() for _ in range(batch)]
            for fixed in (False, True) if turn % 2 else (True, False):
                times[fixed].append(measure(engines[fixed], prompts))
        row: dict[str, float] = {"batch": batch}
        for i, (part, tokens) in enumerate((("reading", PROMPT), ("decoding", STEPS))):
            seconds = {fixed: median(each[i] for each in times[fixed][1:]) for fixed in times}  # the first compiles
            row[f"{part}_default"], row[f"{part}_deterministic"] = (batch * tokens / seconds[f] for f in (False, True))
            row[f"{part}_ratio"] = median(b[i] / a[i] for a, b in list(zip(times[False], times[True], strict=True))[1:])
        found.append(row)
        good &= batch != 16 or row["decoding_ratio"] <= BAR
        if not args.json:
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
    for engine in engines.values():
        engine.shutdown()
    if args.json:
        print(json.dumps(found))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
