"""Engines side by side on a real model: prefill, decode and time to first token, of the same weights, in one run.

    python3 -m venv peers          # once, and llama.cpp built for this processor:
    CMAKE_ARGS=-DGGML_NATIVE=ON peers/bin/pip install 'llama-cpp-python>=0.3,<0.4' gguf safetensors
    make test-reference            # once: .venv-reference with torch and transformers
    .venv/bin/python benchmarks/engines.py MODEL --engine llama.cpp=peers/bin/python \
        --engine transformers=.venv-reference/bin/python [--rounds 3] [--json]
    .venv/bin/python benchmarks/engines.py MODEL --ours w8 --engine llama.cpp:q8_0=peers/bin/python

MODEL is the folder of a checkpoint of Llama's family. Weights are float32, or in the FORMAT of ``--ours FORMAT`` and
``--engine NAME:FORMAT=PYTHON``; rootcellar itself may be among the others. Each engine runs in a process of its own
with as many threads as there are processors, sleeps while others are asked, and takes turns with them; medians are
told, and ratios of medians. Prompts are random tokens; what is decoded is compared where both are float32.
``engine_workers.py`` says how each is asked. Below the table: how fast
this machine reads memory with so many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from engine_workers import FORMATS

FRESH = 16
"""Tokens at the end of a long prompt that are new when the rest is cached."""


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: Engine, folder: str, threads: int) -> None:
        script = Path(__file__).with_name("engine_workers.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.name, self.exact = engine.title, engine.form == "float32"
        self._process = subprocess.Popen(
            [engine.python, str(script), engine.name, folder, engine.form, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, call: str, **words):
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"call": call, **words}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: see above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def agreed(what: str, answers: dict[str, list]) -> None:
    """Engines add in other orders, so a near tie may part them, for good: it is told where, and answers begin alike."""
    (first, ours), *others = answers.items()
    for name, theirs in others:
        same = np.logical_and.accumulate(np.asarray(theirs) == np.asarray(ours), axis=1)
        if same.mean() < 1:
            print(f"{what}: {name} and {first} part after {same.mean():.0%} of the tokens", file=sys.stderr)
        if same[:, 0].mean() < 0.9:
            raise SystemExit(f"{what}: {name} and {first} disagree from the first token on")


def measured(workers: list[Worker], args: argparse.Namespace, vocabulary: int) -> list[dict]:
    rows = []
    dice = np.random.default_rng(args.seed)

    def prompts(batch, length):
        return dice.integers(3, vocabulary, (batch, length)).tolist()

    def told(what, unit, figures):
        rows.append({"what": what, "unit": unit, **{name: median(each) for name, each in figures.items()}})
        print(shown(rows[-1]), file=sys.stderr, flush=True)

    def each_turn(turn):
        """Nobody is always the first."""
        return workers[turn % len(workers) :] + workers[: turn % len(workers)]

    for length in args.prefill:
        figures: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for turn in range(args.rounds + 1):
            (prompt,) = prompts(1, length)
            for worker in each_turn(turn):
                worker.ask("forget")
                seconds, _ = worker.ask("first_token", prompt=prompt)
                if turn:  # the first warms up
                    figures[worker.name].append(length / seconds)
        told(f"prefill {length}", "tokens/s", figures)
    for batch in args.batch:
        for length in args.context:
            figures = {worker.name: [] for worker in workers}
            filled = prompts(batch, length)
            for worker in workers:
                worker.ask("fill", prompts=filled)
            for turn in range(args.rounds + 1):
                answers = {}
                for worker in each_turn(turn):
                    seconds, tokens = worker.ask("decode", steps=args.steps)
                    if worker.exact:
                        answers[worker.name] = tokens
                    if turn:
                        figures[worker.name].append(batch * args.steps / seconds)
                if answers:
                    agreed(f"decode, batch {batch}, context {length}", answers)
            told(f"decode, batch {batch}, context {length}", "tokens/s", figures)
    cold: dict[str, list[float]] = {worker.name: [] for worker in workers}
    cached: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn in range(args.rounds + 1):
        (prompt,) = prompts(1, args.long)
        changed = prompt[:-FRESH] + prompts(1, FRESH)[0]
        for worker in each_turn(turn):
            worker.ask("forget")
            first, _ = worker.ask("first_token", prompt=prompt)
            second, _ = worker.ask("first_token", prompt=changed)
            if turn:
                cold[worker.name].append(first)
                cached[worker.name].append(second)
    told(f"first token of {args.long}, cold", "s", cold)
    told(f"first token of {args.long}, all but {FRESH} cached", "s", cached)
    return rows


def shown(row: dict) -> str:
    """A row of the table: each engine's figure, and how many times as fast the first is."""
    (ours, *theirs) = (value for name, value in row.items() if name not in ("what", "unit"))
    faster = [each / ours if row["unit"] == "s" else ours / each for each in theirs]
    words = [f"{ours:.3g}", *(f"{each:.3g} ({ratio:.2f}×)" for each, ratio in zip(theirs, faster, strict=True))]
    return f"| {row['what']}, {row['unit']} | {' | '.join(words)} |"


class Engine(NamedTuple):
    """An engine, the format of its weights, and the interpreter that it runs in."""

    name: str
    form: str
    python: str

    @property
    def title(self) -> str:
        return self.name if self.form == "float32" else f"{self.name} {self.form}"


def engine(text: str) -> Engine:
    which, _, python = text.partition("=")
    name, _, form = which.partition(":")
    form = form or "float32"
    if form not in FORMATS.get(name, ()) or not python:
        known = ", ".join(f"{name}[:{'|'.join(forms)}]=PYTHON" for name, forms in FORMATS.items())
        raise argparse.ArgumentTypeError(f"write one of {known}")
    return Engine(name, form, python)


def read_bandwidth(threads: int, seconds: float = 2.0) -> float:
    """Bytes a second that so many threads read together, each its own memory, far more than caches hold: the best."""
    parts = np.ones((threads, 2**25), np.float32)
    best, until = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < until:
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, parts.nbytes / (time.perf_counter() - began))
    return best


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'an unknown processor'}, {os.cpu_count()} threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a checkpoint")
    parser.add_argument("--ours", choices=FORMATS["rootcellar"], default="float32", help="our format")
    parser.add_argument("--engine", type=engine, action="append", default=[], metavar="NAME[:FORMAT]=PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="decode steps timed in a round")
    parser.add_argument("--prefill", type=int, nargs="*", default=[500, 2000])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--context", type=int, nargs="*", default=[128, 2000])
    parser.add_argument("--long", type=int, default=2000, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    vocabulary = json.loads(Path(args.model, "config.json").read_text())["vocab_size"]
    bandwidth = read_bandwidth(args.threads)
    engines = [Engine("rootcellar", args.ours, sys.executable), *args.engine]
    workers = [Worker(each, args.model, args.threads) for each in engines]
    try:
        versions = {worker.name: worker.ask("version") for worker in workers}
        rows = measured(workers, args, vocabulary)
    finally:
        for worker in workers:
            worker.close()
    found = {"machine": machine(), "seed": args.seed, "bandwidth": bandwidth, "versions": versions, "rows": rows}
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{machine()}; {', '.join(versions.values())}\n")
    print(f"| | {' | '.join(worker.name for worker in workers)} |\n|{'---|' * (len(workers) + 1)}")
    print("\n".join(map(shown, rows)))
    print(f"\nMemory is read at {bandwidth / 1e9:.1f} GB/s by {args.threads} threads.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
