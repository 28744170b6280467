"""Decode steps that overlap with the host's work, and those that do not: 64 requests at a time of the embedded model.

    .venv/bin/python benchmarks/overlap.py [--batch 64] [--rounds 8] [--device-ms 10] [--model-path FOLDER]

Two engines in one process, in turns: the time of a decode step, in medians of the rounds, and the part of it in which
the device had nothing to do.

``--device-ms``: a double stands in the device's place, which takes so long for each step and no core of this machine,
as an accelerator would. It begins a step when it has it and the one before is done, and counts how long it waited. The
host's work is the engine's own: planning, building batches, taking tokens, text, results.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from statistics import median

import numpy as np

import rootcellar
from rootcellar.runner import Runner


@dataclass
class Device:
    """A double: when it will be done with all that it was given, and the seconds that it had nothing to do."""

    seconds: float
    free: float = 0.0
    idle: float = 0.0

    def begin(self) -> float:
        """A step is handed over; the time at which it will be done."""
        now = time.perf_counter()
        self.idle += max(0.0, now - self.free) if self.free else 0.0
        self.free = max(now, self.free) + self.seconds
        return self.free


@dataclass(frozen=True)
class Due:
    """What a double's step gave, for whoever reads it: any tokens, when they are due."""

    rows: int
    at: float
    newest: object = field(default=None)

    def read(self) -> tuple[np.ndarray, np.ndarray, None]:
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return np.full(self.rows, 65, np.int32), np.zeros(self.rows, np.float32), None


class OnDouble(Runner):
    """A runner whose steps are a double's: it is handed what the device would be, and computes nothing."""

    def __init__(self, runner: Runner, device: Device) -> None:
        super().__init__(runner.programs, runner.params, runner.pools)
        self.device = device

    def step(self, batch, before=None):  # type: ignore[no-untyped-def] # noqa: ARG002
        """See ``Runner``."""
        self.arguments(batch)
        return np.empty((len(batch.rows), 0)), np.empty((len(batch.tokens), 0))

    def sample(self, scores, rows, k=0):  # type: ignore[no-untyped-def] # noqa: ARG002
        """See ``Runner``."""
        return Due(scores.shape[0], self.device.begin())


def decode(engine: rootcellar.Engine, batch: int, tokens: int) -> tuple[float, float]:
    """Mean seconds of a decode step, and the part of it in which the device had nothing to do."""
    prompts = [list(range(7 * i, 7 * i + 64)) for i in range(batch)]
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}
    runner = engine._loop.machine.runner
    if isinstance(runner, OnDouble):
        runner.device.free = 0.0  # what lay between two runs was nobody's idling
    before = _counts(engine)
    engine.generate(input_ids=prompts, sampling_params=sampling)
    steps, seconds, outside = (now - then for now, then in zip(_counts(engine), before, strict=True))
    return seconds / steps, outside / seconds


def _counts(engine: rootcellar.Engine) -> tuple[int, float, float]:
    """Decode steps so far, their seconds, and those in which the device had nothing to do."""
    reading = engine.sight.reading()
    machine = engine._loop.machine
    if isinstance(machine.runner, OnDouble):
        outside = machine.runner.device.idle
    else:
        outside = reading.stats["outside_seconds"]["decode"]
    found = next(d for labels, d in reading.distributions["step_seconds"] if labels["phase"] == "decode")
    return found.count, found.sum, outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--device-ms", type=float, help="a double that takes so long for a step (none: this machine)")
    args = parser.parse_args()
    options = {"model_path": args.model_path, "max_total_tokens": 32768, "max_running_requests": args.batch}
    with (
        rootcellar.Engine(**options, disable_overlap_schedule=False) as overlap,
        rootcellar.Engine(**options, disable_overlap_schedule=True) as plain,
    ):
        engines = {"overlap": overlap, "without": plain}
        for engine in engines.values():
            if args.device_ms:
                machine = engine._loop.machine
                machine.runner = OnDouble(machine.runner, Device(args.device_ms / 1e3))
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
