"""Decode steps that overlap with the host's work, and those that do not: the embedded model, 64 requests at a time.

    .venv/bin/python benchmarks/overlap.py [--batch 64] [--rounds 8]

Two engines in one process, in turns: the time of a decode step, in medians of the rounds, and the part of it in which
the device had nothing to do.
"""

from __future__ import annotations

import argparse
from statistics import median

import rootcellar


def decode(engine: rootcellar.Engine, batch: int, tokens: int) -> tuple[float, float]:
    """Mean seconds of a decode step, and the part of it in which the device had nothing to do."""
    prompts = [list(range(7 * i, 7 * i + 64)) for i in range(batch)]
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}
    before = _counts(engine)
    engine.generate(input_ids=prompts, sampling_params=sampling)
    steps, seconds, outside = (now - then for now, then in zip(_counts(engine), before, strict=True))
    return seconds / steps, outside / seconds


def _counts(engine: rootcellar.Engine) -> tuple[int, float, float]:
    """Decode steps so far, their seconds, and those in which the device had nothing to do."""
    reading = engine.sight.reading()
    found = next(d for labels, d in reading.distributions["step_seconds"] if labels["phase"] == "decode")
    return found.count, found.sum, reading.stats["outside_seconds"]["decode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    options = {"model_path": "demo", "max_total_tokens": 32768, "max_running_requests": args.batch}
    with (
        rootcellar.Engine(**options, disable_overlap_schedule=False) as overlap,
        rootcellar.Engine(**options, disable_overlap_schedule=True) as plain,
    ):
        engines = {"overlap": overlap, "without": plain}
        for engine in engines.values():
            decode(engine, args.batch, 8)
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for i in range(args.rounds):
            for name in sorted(engines, reverse=bool(i % 2)):
                rows[name].append(decode(engines[name], args.batch, args.tokens))
    print(f"{'':>10}{'step, us':>12}{'device idle':>14}")
    for name, row in rows.items():
        print(f"{name:>10}{1e6 * median(s for s, _ in row):>12.0f}{median(o for _, o in row):>14.1%}")


if __name__ == "__main__":
    main()
