"""What counting, timing and remembering cost a step: the recorder's own work against the step it describes.

    .venv/bin/python benchmarks/metrics_cost.py

Prints, for decode steps of several batch sizes of the embedded model (a small one: the worst case for the share), the
mean time of a step, the mean time of the recorder's calls for it (less what timing them costs), and the ratio.
"""

from __future__ import annotations

import argparse
import time

import rootcellar
from rootcellar.engine.recorder import Recorder

VERBS = ("step_begins", "planned", "dispatched", "computed", "token", "step_ended")


class Timed:
    """A recorder that times the calls that the loop makes in a step."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.seconds = 0.0
        self.calls = 0
        self.steps = 0

    def __getattr__(self, name):
        method = getattr(self._recorder, name)
        if name not in VERBS:
            return method

        def timed(*args):
            began = time.perf_counter()
            method(*args)
            self.seconds += time.perf_counter() - began
            self.calls += 1
            self.steps += name == "step_ended"

        return timed


def measure(engine: rootcellar.Engine, batch: int, tokens: int) -> tuple[float, float]:
    """Mean seconds of a decode step and of the recorder's part in it."""
    prompts = [list(range(10 * i, 10 * i + 64)) for i in range(batch)]
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}
    engine.generate(input_ids=prompts, sampling_params=sampling)
    before = _decode(engine)
    timed = engine._loop.machine.recorder = Timed(engine._loop.machine.recorder)
    engine.generate(input_ids=prompts, sampling_params=sampling)
    engine._loop.machine.recorder = timed._recorder
    after = _decode(engine)
    step = (after.sum - before.sum) / (after.count - before.count)
    return step, (timed.seconds - timed.calls * _clock_cost()) / timed.steps


def _clock_cost() -> float:
    """Seconds that timing an empty call seems to take."""

    class Empty:
        def computed(self) -> None:
            pass

    timed = Timed(Empty())
    for _ in range(20000):
        timed.computed()
    return timed.seconds / timed.calls


def _decode(engine):
    return next(d for labels, d in engine.sight.reading().distributions["step_seconds"] if labels["phase"] == "decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    print(f"{'batch':>6}{'step, us':>12}{'recorder, us':>14}{'share':>9}")
    with rootcellar.Engine(model_path="demo", max_total_tokens=32768, max_running_requests=64) as engine:
        for batch in (1, 4, 16, 64):
            step, recorder = measure(engine, batch, args.tokens)
            print(f"{batch:>6}{step * 1e6:>12.0f}{recorder * 1e6:>14.1f}{recorder / step:>9.2%}")


if __name__ == "__main__":
    main()
