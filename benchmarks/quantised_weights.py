"""What weights of few bits cost in quality on a real model: ours, and llama.cpp's of the same float32 weights.

    python benchmarks/quantised_weights.py MODEL [--engine llama.cpp=PYTHON] [--tokens 8000] [--off-grid] [--json]

The text of ``quantised_kv.py`` goes through each engine in windows of ``--context`` tokens, over KV in float32 (that of
llama.cpp's formats of few bits: in float16). Of every position: the KL divergence from the distribution of the next
token that our float32 weights give (in nats), whether the likeliest token is the same, and the perplexity.

A checkpoint that was quantised once already lies on a grid, which a format may find again: then it costs nothing, and
says nothing of weights as they are trained. ``--off-grid`` adds noise to each matrix, evenly drawn, as wide as a step
of 4 bits of each 32 inputs, so that no format's own grid fits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from engines import Engine, Worker
from jax import Array
from quantised_kv import SCORED, Model, compared, distributions, text
from safetensors.numpy import load_file, save_file

OURS, THEIRS = ("float32", "bfloat16", "w8", "w4"), ("float32", "q8_0", "q4_1")
GROUP, STEPS = 32, 15


def off_grid(folder: Path, to: Path) -> Path:
    """A checkpoint like ``folder``'s, with noise on its matrices."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    dice = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            groups = tensor.astype(np.float32).reshape(-1, GROUP)
            step = (groups.max(axis=1, keepdims=True) - groups.min(axis=1, keepdims=True)) / STEPS
            tensors[name] = (
                (groups + step * dice.uniform(-0.5, 0.5, groups.shape)).astype(np.float32).reshape(tensor.shape)
            )
    save_file(tensors, to / "model.safetensors")
    return to


def theirs(worker: Worker, window: np.ndarray, folder: str) -> Iterator[Array]:
    """As :func:`distributions`, of another engine."""
    path = Path(folder, "scores.npy")
    worker.ask("scores", prompt=window.tolist(), path=str(path))
    scores = np.load(path)
    path.unlink()
    for at in range(0, len(scores), SCORED):
        yield jax.nn.log_softmax(jnp.asarray(scores[at : at + SCORED]))


def measured(folder: Path, python: str | None, tokens: int, context: int, scratch: str) -> list[dict[str, object]]:
    """A row for each engine and format."""
    models = {form: Model(folder, form) for form in OURS}
    ids = np.asarray(models["float32"].ids(text())[:tokens], np.int64)
    windows = [ids[start : start + context] for start in range(0, len(ids), context)]
    following = [np.append(window[1:], -1).astype(np.int32) for window in windows]
    wide = []
    rows: list[dict[str, object]] = []

    def add(name: str, each: Iterator[Iterator[Array]]) -> None:
        sums = np.zeros(3)
        for expected, given, after in zip(wide, each, following, strict=True):
            for at, (one, other) in enumerate(zip(expected, given, strict=True)):
                part = after[at * SCORED : (at + 1) * SCORED]
                part = np.pad(part, (0, len(other) - len(part)), constant_values=-1)
                sums += np.asarray(compared(one[: len(other)], other, part))
        kl, same, said = sums / (len(ids) - len(windows))
        rows.append({"format": name, "kl": kl, "top1": same, "perplexity": float(np.exp(-said)), "tokens": len(ids)})
        print(f"{name}: KL {kl:.6f}, top-1 {same:.2%}, perplexity {np.exp(-said):.3f}", file=sys.stderr, flush=True)

    for form, model in models.items():
        runner = model.runner("float32", context, 1)
        if form == "float32":
            wide = [[np.asarray(part) for part in distributions(model, runner, window)] for window in windows]
        add(form, (distributions(model, runner, window) for window in windows))
    for form in THEIRS if python is not None else ():
        worker = Worker(Engine("llama.cpp", form, python), str(folder), os.cpu_count() or 1)
        add(f"llama.cpp {form}", (theirs(worker, window, scratch) for window in windows))
        worker.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of a checkpoint of Llama's family")
    parser.add_argument("--engine", metavar="llama.cpp=PYTHON")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--off-grid", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    python = None if args.engine is None else args.engine.removeprefix("llama.cpp=")
    with tempfile.TemporaryDirectory() as scratch:
        folder = off_grid(args.model, Path(scratch, "off-grid")) if args.off_grid else args.model
        rows = measured(folder, python, args.tokens, args.context, scratch)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['format']:<20}  KL {row['kl']:.6f}  top-1 {row['top1']:.2%}  perplexity {row['perplexity']:.3f}")


if __name__ == "__main__":
    main()
