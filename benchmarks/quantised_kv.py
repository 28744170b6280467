"""What a KV cache of few bits costs in quality, and what it gains in speed and room, on a real model.

    python benchmarks/quantised_kv.py --model-path FOLDER [--tokens 2000] [--context 2000] [--types int8,k8v4] [--json]
    python benchmarks/quantised_kv.py --model-path FOLDER --speed [--contexts 128,2000,8000] [--batch 1]

Quality: the docstrings of numpy's public names, in alphabetical order, go through the engine's own compiled steps, in
windows of ``--context`` tokens and chunks of 256, once with each type of cache; weights and arithmetic are float32. Of
every position: the KL divergence from the float32 cache's distribution of the next token (in nats), whether the
likeliest token is the same, and the perplexity. Beside ours stand what others do: one scale of 1.0 for a whole tensor
(SGLang's default), and blocks that were not rotated first. ``--tokens 50000`` is the long form.

Speed: a decode step at a context of so many tokens, in pages that hold zeros; types take turns. The least of
``--rounds`` counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

from rootcellar.models.config import load_config
from rootcellar.models.decoder import logits
from rootcellar.models.kinds import paging
from rootcellar.models.loader import load_params
from rootcellar.ops.backends import choose_backend
from rootcellar.plan.grids import NARROW
from rootcellar.plan.stored import Heads
from rootcellar.pools.layouts import LAYOUTS, PagedHeads, layout_of
from rootcellar.runner import Batch, BatchPart, Placement, Programs, Runner, Shapes, pools_of

PAGE, CHUNK, SCORED = 16, 256, 64
OURS = ("bfloat16", *NARROW)


# --- what others do ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneScale(PagedHeads):
    """Keys and values as floats of 8 bits, as they are: a scale of 1.0 for all. Simulated: kept in float32."""

    name: ClassVar[str] = "one scale"
    narrow: str = "float8_e4m3fn"

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """See ``TokenLayout``: what is too large becomes the largest number."""
        most = float(jnp.finfo(self.narrow).max)
        narrow = (jnp.clip(part, -most, most).astype(self.narrow).astype(jnp.float32) for part in parts)
        return super().write(buffers, pages, offsets, list(narrow))


def one_scale(narrow: str) -> Callable[[Heads, str, int], OneScale]:
    return lambda stored, _, page: OneScale(
        stored.kv_heads, stored.head_dim, jnp.dtype(jnp.float32), page, narrow=narrow
    )


def unturned(name: str) -> Callable[[Heads, str, int], object]:
    return lambda stored, _, page: dataclasses.replace(layout_of(stored, name, page), turned=False)


def turned(name: str) -> Callable[[Heads, str, int], object]:
    return lambda stored, _, page: dataclasses.replace(layout_of(stored, name, page), turned=True)


OTHERS = {
    "fp8_e4m3 one scale": one_scale("float8_e4m3fn"),
    "fp8_e5m2 one scale": one_scale("float8_e5m2"),
    "int8 unrotated": unturned("int8"),
    "fp8_e4m3 rotated": turned("fp8_e4m3"),
    "k8v4 unrotated": unturned("k8v4"),
    "fp4_e2m1 unrotated": unturned("fp4_e2m1"),
}


# --- the engine's steps -----------------------------------------------------------------------------------------------


class Model:
    """A checkpoint, of which runners with caches of any type are made; they share its weights."""

    def __init__(self, folder: Path) -> None:
        self.cfg = load_config(folder)
        self.placement = Placement(self.cfg)
        self.params = self.placement.place(load_params(folder, self.cfg, np.float32))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.logits = jax.jit(lambda params, hidden: logits(params, self.cfg, hidden))

    def runner(self, dtype: str, tokens: int, rows: int) -> Runner:
        """A runner whose cache of type ``dtype`` holds ``tokens`` tokens of each of ``rows`` rows."""
        pages = paging(self.cfg, dtype, PAGE, arena=True)
        backend = choose_backend("auto", pages.attended, jax.default_backend())
        width = -(-tokens // PAGE)
        programs = Programs(
            self.placement, jnp.dtype(jnp.float32), pages, backend, Shapes.of(CHUNK, rows), width, 0
        )  # fmt: skip
        return Runner(programs, self.params, pools_of(pages, self.placement, dict.fromkeys(pages.pools, width * rows)))


def tables_of(runner: Runner, rows: int) -> dict[str, np.ndarray]:
    """Page tables of ``rows`` rows, each with pages of its own; row 0 is padding's."""
    width = runner.programs.table_width
    table = np.zeros((rows + 1, width), np.int32)
    table[1:] = 1 + np.random.default_rng(0).permutation(rows * width).reshape(rows, width)
    return {kind.name: table for kind in runner.programs.paging.kinds}


def distributions(model: Model, runner: Runner, tokens: np.ndarray) -> Iterator[Array]:
    """Log-probabilities of the next token [SCORED, V] at every position, some at a time."""
    tables = tables_of(runner, 1)
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        _, hidden = runner.step(Batch.build([BatchPart(1, start, part)], tables, runner.shapes.tile))
        for at in range(0, len(part), SCORED):
            yield jax.nn.log_softmax(model.logits(model.params, hidden[at : at + SCORED]))


@jax.jit
def compared(wide: Array, narrow: Array, following: Array) -> tuple[Array, Array, Array]:
    """KL, agreement and logprobs of what follows, summed; ``following`` [N] is -1 where nothing does."""
    there = following >= 0
    kl = jnp.sum(jnp.exp(wide) * (wide - narrow), axis=-1)
    same = jnp.argmax(wide, axis=-1) == jnp.argmax(narrow, axis=-1)
    said = jnp.take_along_axis(narrow, jnp.maximum(following, 0)[:, None], axis=-1)[:, 0]
    return jnp.sum(kl * there), jnp.sum(same & there), jnp.sum(said * there)


def text() -> str:
    """The docstrings of numpy's public names."""
    found = (getattr(np, name).__doc__ for name in sorted(np.__all__) if not name.startswith("_"))
    return "\n\n".join(doc for doc in found if isinstance(doc, str))


def quality(model: Model, types: Sequence[str], tokens: int, context: int) -> list[dict[str, object]]:
    ids = np.asarray(model.tokenizer.encode(text(), add_special_tokens=False).ids[:tokens], np.int64)
    for name in types:
        if name in OTHERS:
            LAYOUTS.setdefault(("heads", name), OTHERS[name])
    names = ["float32", *types]
    runners = {name: model.runner(name, context, 1) for name in names}
    sums = {name: np.zeros(3) for name in names}
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        following = np.append(window[1:], -1).astype(np.int32)
        wide = list(distributions(model, runners["float32"], window))
        for name in names:
            each = iter(wide) if name == "float32" else distributions(model, runners[name], window)
            for at, (expected, found) in enumerate(zip(wide, each, strict=True)):
                part = following[at * SCORED : (at + 1) * SCORED]
                part = np.pad(part, (0, len(found) - len(part)), constant_values=-1)
                sums[name] += np.asarray(compared(expected, found, part))
            kl, same, _ = sums[name] / (start + len(window))
            print(f"{start + len(window)} tokens: {name}: KL {kl:.6f}, top-1 {same:.2%}", file=sys.stderr, flush=True)
    places = len(ids) - -(-len(ids) // context)
    rows = []
    for name in names:
        kl, same, said = sums[name] / places
        layout = next(iter(runners[name].programs.paging.layouts.values()))
        row = {"type": name, "kl": kl, "top1": same, "perplexity": float(np.exp(-said)), "tokens": len(ids)}
        rows.append(row | {"bits": _bits(layout), "backend": runners[name].programs.backend})
    return rows


def _bits(layout: object) -> float | None:
    """Of an element, scales included; what is simulated has none."""
    if isinstance(layout, OneScale):
        return 8.0
    nbytes = sum(np.prod(array.shape) * array.dtype.itemsize for array in layout.buffers(1))
    return float(nbytes * 8 / (2 * layout.kv_heads * layout.page_size * layout.head_dim))


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(
    model: Model, types: Sequence[str], contexts: Sequence[int], rows: int, rounds: int
) -> list[dict[str, object]]:
    """Seconds of a decode step of ``rows`` rows at each context, and how often float32's speed that is."""
    names = ["float32", *types]
    runners = {name: model.runner(name, max(contexts) + PAGE, rows) for name in names}
    least: dict[tuple[str, int], float] = {}
    for number in range(rounds + 1):  # the first compiles
        for context in contexts:
            for name, runner in runners.items():
                parts = [BatchPart(1 + row, context, np.array([100 + row])) for row in range(rows)]
                batch = Batch.build(parts, tables_of(runner, rows), 1)
                begun = time.perf_counter()
                jax.block_until_ready(runner.step(batch))
                took = time.perf_counter() - begun
                if number:
                    least[name, context] = min(took, least.get((name, context), took))
    return [
        {"type": name, "context": context, "rows": rows, "seconds": seconds, "backend": runners[name].programs.backend,
         "speed": least["float32", context] / seconds}
        for (name, context), seconds in least.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="Folder of a checkpoint.")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--types", help=f"Some of: {', '.join((*OURS, *OTHERS))} [default: all].")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--contexts", default="128,2000,8000")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    known = OURS if args.speed else (*OURS, *OTHERS)
    types = known if args.types is None else args.types.split(",")
    if not set(types) <= set(known):
        parser.error(f"--types are some of {', '.join(known)}")
    model = Model(args.model_path)
    if args.speed:
        rows = speed(model, types, [int(n) for n in args.contexts.split(",")], args.batch, args.rounds)
    else:
        rows = quality(model, types, args.tokens, args.context)
    for row in rows:
        if args.json:
            print(json.dumps(row), flush=True)
        elif args.speed:
            print(
                f"{row['type']:<24} {row['backend']:<7} batch {row['rows']:>2} context {row['context']:>5}: "
                f"{row['seconds'] * 1e3:8.2f} ms {row['speed']:6.2f}x"
            )
        else:
            print(
                f"{row['type']:<24} {row['backend']:<7} {row['bits']:5.2f} bits  KL {row['kl']:.6f}  "
                f"top-1 {row['top1']:7.2%}  perplexity {row['perplexity']:.4f}"
            )


if __name__ == "__main__":
    main()
