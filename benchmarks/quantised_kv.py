"""What a KV cache of few bits costs in quality, and what it gains in speed and room, on a real model.

    python benchmarks/quantised_kv.py --model-path FOLDER [--tokens 2000] [--context 2000] [--types int8,k8v4] [--json]
    python benchmarks/quantised_kv.py --model-path FOLDER --needles [--contexts 2000,8000]
    python benchmarks/quantised_kv.py --model-path FOLDER --speed [--contexts 128,2000,8000] [--batch 1,16]
    python benchmarks/quantised_kv.py --goldens [NAME,NAME]

Quality: the docstrings of numpy's public names, in alphabetical order, go through the engine's own compiled steps, in
windows of ``--context`` tokens and chunks of 256, once with each type of cache; weights and arithmetic are float32. Of
every position: the KL divergence from the float32 cache's distribution of the next token (in nats), whether the
likeliest token is the same, and the perplexity. Beside ours stand what others do: one scale for a whole tensor, 1.0
(SGLang's default) or calibrated (the largest magnitude of each layer's keys, and of its values, in another part of the
text, over the grid's largest value), and blocks that were not rotated first. ``--tokens 50000`` is the long form.

Needles: sentences that say a number each are put between parts of that text, at equal distances, and after the whole
context each is asked for. Retrieved is one whose digits are all the likeliest tokens, one after the other.

Speed: a decode step at a context of so many tokens; weights are packed as the engine packs them. Each type takes turns
with float32, and what counts is the median of the ratios of neighbours: what disturbs the machine disturbs both.

Goldens: the checkpoints of all families for which the tests know what transformers answers, in engines of each type
that the family can have: KL and agreement over the golden prompts and answers, as above. They are small and of random
weights, so these numbers say that every family's cache keeps what it should, and nothing of what people would lose.

``--kept FILE`` keeps what was measured of each window, or of each context of needles, and goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

import rootcellar
import rootcellar.errors
from rootcellar.models.config import load_config
from rootcellar.models.decoder import logits
from rootcellar.models.kinds import paging
from rootcellar.models.loader import load_params
from rootcellar.models.spec import Params
from rootcellar.ops.backends import choose_backend
from rootcellar.plan.grids import NARROW
from rootcellar.plan.stored import Heads
from rootcellar.pools.layouts import LAYOUTS, PagedHeads, layout_of
from rootcellar.runner import Batch, BatchPart, Placement, Programs, Runner, Shapes, pools_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import checkpoints

PAGE, CHUNK, SCORED = 16, 256, 64
CALIBRATED = slice(100_000, 102_000)  # tokens of the text by which scales are calibrated
PLACES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Athens", "Dublin", "Lisbon", "Moscow")
PLACES += ("Tokyo", "Cairo", "Boston", "Chicago", "Denver")
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
SCALED = ("fp8_e4m3 one scale calibrated",)


# --- the engine's steps -----------------------------------------------------------------------------------------------


class Model:
    """A checkpoint, of which runners with caches of any type are made; they share its weights."""

    def __init__(self, folder: Path, holding: str | None = None) -> None:
        self.cfg = load_config(folder)
        self.placement = Placement(self.cfg, holding=holding)
        self.params = self.placement.place(load_params(folder, self.cfg, np.float32))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.logits = jax.jit(lambda params, hidden: logits(params, self.cfg, hidden))
        self.scaled: Params | None = None

    def ids(self, words: str) -> list[int]:
        return list(self.tokenizer.encode(words, add_special_tokens=False).ids)

    def runner(self, name: str, tokens: int, rows: int) -> Runner:
        """A runner whose cache of the type ``name`` holds ``tokens`` tokens of each of ``rows`` rows."""
        dtype = name.removesuffix(" calibrated")
        if dtype in OTHERS:
            LAYOUTS.setdefault(("heads", dtype), OTHERS[dtype])
        pages = paging(self.cfg, dtype, PAGE, arena=True)
        backend = choose_backend("auto", pages.attended, jax.default_backend())
        width = -(-tokens // PAGE)
        programs = Programs(
            self.placement, jnp.dtype(jnp.float32), pages, backend, Shapes.of(CHUNK, rows), width, 0
        )  # fmt: skip
        params = self.params if dtype == name else self.calibrated(float(jnp.finfo(OneScale.narrow).max))
        return Runner(programs, params, pools_of(pages, self.placement, dict.fromkeys(pages.pools, width * rows)))

    def calibrated(self, top: float) -> Params:
        """Weights by which keys and values come divided by a scale of their layer, and queries and outputs multiplied.

        So a cache with one scale of 1.0 does what one with calibrated scales does. (Rotary embeddings are linear.)
        """
        if self.scaled is not None:
            return self.scaled
        tokens = np.asarray(self.ids(text())[CALIBRATED], np.int64)
        runner = self.runner("float32", len(tokens), 1)
        for start in range(0, len(tokens), CHUNK):
            runner.step(Batch.build([BatchPart(1, start, tokens[start : start + CHUNK])], tables_of(runner, 1), 16))
        (pool,) = runner.pools.values()
        layers = []
        for layer, (buffer,) in zip(self.params["layers"], pool.buffers, strict=True):
            if "q_norm" in layer or "qkv_bias" in layer:
                raise SystemExit("scales are calibrated of models without norms by head and without biases")
            keys, values = (float(most) / top for most in jnp.max(jnp.abs(buffer[1:]), axis=(0, 2, 3, 4)))
            rows = layer["qkv"].shape[2]
            by = np.array([keys] * (rows - 2) + [1 / keys, 1 / values], np.float32)[:, None]
            layers.append({**layer, "qkv": layer["qkv"] * by, "o": layer["o"] * np.float32(values)})
        self.scaled = {**self.params, "layers": layers}
        return self.scaled


def tables_of(runner: Runner, rows: int) -> dict[str, np.ndarray]:
    """Page tables of ``rows`` rows, each with pages of its own; row 0 is padding's."""
    width = runner.programs.table_width
    table = np.zeros((rows + 1, width), np.int32)
    table[1:] = 1 + np.random.default_rng(0).permutation(rows * width).reshape(rows, width)
    return {kind.name: table for kind in runner.programs.paging.kinds}


def distributions(model: Model, runner: Runner, tokens: np.ndarray) -> Iterator[Array]:
    """Log-probabilities of the next token [SCORED, V] at every position, some at a time."""
    for part, hidden in fed(runner, tokens):
        for at in range(0, len(part), SCORED):
            yield jax.nn.log_softmax(model.logits(runner.params, hidden[at : at + SCORED]))


def fed(runner: Runner, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, Array]]:
    """Runs row 1 through ``tokens``; of each chunk its tokens and their hidden states."""
    tables = tables_of(runner, 1)
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        yield part, runner.step(Batch.build([BatchPart(1, start, part)], tables, runner.shapes.tile))[1]


def text() -> str:
    """The docstrings of numpy's public names."""
    found = (getattr(np, name).__doc__ for name in sorted(np.__all__) if not name.startswith("_"))
    return "\n\n".join(doc for doc in found if isinstance(doc, str))


class Kept:
    """What was measured, by what it was measured of: lines of JSON in a file; None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._path, self._found = path, {json.dumps(of): numbers for of, numbers in map(json.loads, lines)}

    def get(self, *of: object) -> np.ndarray | None:
        found = self._found.get(json.dumps(of))
        return None if found is None else np.array(found)

    def put(self, numbers: np.ndarray, *of: object) -> None:
        self._found[json.dumps(of)] = numbers.tolist()
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps([of, numbers.tolist()]) + "\n")


# --- quality ----------------------------------------------------------------------------------------------------------


@jax.jit
def compared(wide: Array, narrow: Array, following: Array) -> tuple[Array, Array, Array]:
    """KL, agreement and logprobs of what follows, summed; ``following`` [N] is -1 where nothing does."""
    there = following >= 0
    kl = jnp.sum(jnp.exp(wide) * (wide - narrow), axis=-1)
    same = jnp.argmax(wide, axis=-1) == jnp.argmax(narrow, axis=-1)
    said = jnp.take_along_axis(narrow, jnp.maximum(following, 0)[:, None], axis=-1)[:, 0]
    return jnp.sum(kl * there), jnp.sum(same & there), jnp.sum(said * there)


def quality(model: Model, types: Sequence[str], tokens: int, context: int, kept: Kept) -> list[dict[str, object]]:
    ids = np.asarray(model.ids(text())[:tokens], np.int64)
    names = ["float32", *types]
    runners = {name: model.runner(name, context, 1) for name in names}
    sums = {name: np.zeros(3) for name in names}
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        missing = [name for name in names if kept.get(name, start, len(window)) is None]
        following = np.append(window[1:], -1).astype(np.int32)
        wide = list(distributions(model, runners["float32"], window)) if missing else []
        for name in missing:
            each = iter(wide) if name == "float32" else distributions(model, runners[name], window)
            found = np.zeros(3)
            for at, (expected, given) in enumerate(zip(wide, each, strict=True)):
                part = following[at * SCORED : (at + 1) * SCORED]
                part = np.pad(part, (0, len(given) - len(part)), constant_values=-1)
                found += np.asarray(compared(expected, given, part))
            kept.put(found, name, start, len(window))
        for name in names:
            found = kept.get(name, start, len(window))
            assert found is not None
            sums[name] += found
            kl, same, _ = sums[name] / (start + len(window))
            print(f"{start + len(window)} tokens: {name}: KL {kl:.6f}, top-1 {same:.2%}", file=sys.stderr, flush=True)
    places = len(ids) - -(-len(ids) // context)
    rows = []
    for name in names:
        kl, same, said = sums[name] / places
        row = {"type": name, "kl": kl, "top1": same, "perplexity": float(np.exp(-said)), "tokens": len(ids)}
        rows.append(row | {"bits": _bits(runners[name]), "backend": runners[name].programs.backend})
    return rows


def _bits(runner: Runner) -> float:
    """Of an element, scales included."""
    layout: Any = next(iter(runner.programs.paging.layouts.values()))
    if isinstance(layout, OneScale):
        return 8.0
    nbytes = sum(np.prod(array.shape) * array.dtype.itemsize for array in layout.buffers(1))
    return float(nbytes * 8 / (2 * layout.kv_heads * layout.page_size * layout.head_dim))


# --- needles ----------------------------------------------------------------------------------------------------------


def haystack(model: Model, number: int, context: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """``context`` tokens with a needle for each of ``PLACES`` among them; the places in their order, and what is said
    of each. ``number``: which part of the text, which order and which digits.
    """  # fmt: skip
    random = np.random.default_rng(number)
    said = [(PLACES[i], "".join(map(str, random.integers(10, size=5)))) for i in random.permutation(len(PLACES))]
    needles = [model.ids(f"\n\nThe secret number of {place} is {digits}.\n\n") for place, digits in said]
    room = context - sum(map(len, needles))
    if room < 0:
        raise SystemExit(f"needles take {context - room} tokens: --contexts are longer")
    hay = model.ids(text())[number * context : number * context + room]
    cuts = np.linspace(0, room, len(needles) + 2).astype(int)
    parts = [hay[: cuts[1]]]
    for i, needle in enumerate(needles, 1):
        parts += [needle, hay[cuts[i] : cuts[i + 1]]]
    return np.array([token for part in parts for token in part], np.int64), said


def needles(
    model: Model, types: Sequence[str], contexts: Sequence[int], haystacks: int, kept: Kept
) -> list[dict[str, object]]:
    """How many needles each type of cache retrieves, and the mean logprob of their digits."""
    rows = []
    for context in contexts:
        for name in ("float32", *types):
            runner = None
            sums = np.zeros(3)
            for number in range(haystacks):
                found = kept.get(name, "needles", context, number)
                if found is None:
                    runner = runner or model.runner(name, context + 2 * CHUNK, 1)
                    found = asked(model, runner, *haystack(model, number, context))
                    kept.put(found, name, "needles", context, number)
                sums += found
            right, said, asked_for = sums
            row = {"type": name, "context": context, "retrieved": right, "of": asked_for, "logprob": said / asked_for}
            print(f"{context} tokens: {row}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def asked(model: Model, runner: Runner, tokens: np.ndarray, said: Sequence[tuple[str, str]]) -> np.ndarray:
    """How many needles in ``tokens`` are retrieved, the logprobs of their digits summed, and how many there are."""
    for _ in fed(runner, tokens):
        pass
    sums = np.zeros(3)
    for place, digits in said:
        question = model.ids(f"\n\nThe secret number of {place} is")
        answer = model.ids(f"\n\nThe secret number of {place} is {digits}")[len(question) :]
        part = np.array(question + answer, np.int64)
        _, hidden = runner.step(Batch.build([BatchPart(1, len(tokens), part)], tables_of(runner, 1), 16))
        scores = jax.nn.log_softmax(model.logits(runner.params, hidden[len(question) - 1 : len(part) - 1]))
        right = np.asarray(jnp.argmax(scores, axis=-1)) == answer
        sums += right.all(), float(sum(scores[i, token] for i, token in enumerate(answer))), 1
    return sums


# --- goldens ----------------------------------------------------------------------------------------------------------


def goldens(names: Sequence[str], types: Sequence[str]) -> Iterator[dict[str, object]]:
    """KL and agreement of each type of cache in each golden checkpoint, but of those that the family cannot have."""
    for name in names or checkpoints.golden_names():
        told = checkpoints.golden(name)
        prompts = [prompt + more for prompt, more in zip(told.prompts, told.tokens, strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.make_checkpoint(told.family, folder, seed=told.seed, **told.overrides)
            encoder = load_config(folder).encoder
            if encoder is not None:  # random tokens may ask for a picture
                prompts = [prompt for prompt in prompts if encoder.token not in prompt]
            wide = None
            for dtype in ("float32", *types):
                try:
                    given = answered(Path(folder), dtype, prompts)
                except rootcellar.errors.ConfigError as refusal:
                    print(f"{name}: {refusal}", file=sys.stderr, flush=True)
                    continue
                wide = given if wide is None else wide
                kl = float((np.exp(wide) * (wide - given)).sum(axis=-1).mean())
                same = float((wide.argmax(axis=-1) == given.argmax(axis=-1)).mean())
                yield {"golden": name, "type": dtype, "kl": kl, "top1": same, "tokens": len(given)}


def answered(folder: Path, dtype: str, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-probabilities of the next token [positions, V] within all ``prompts``, by an engine with such a cache."""
    vocabulary = load_config(folder).vocab_size
    options: dict[str, Any] = {"max_total_tokens": 4096, "max_logprobs": vocabulary, "chunked_prefill_size": 64}
    with rootcellar.Engine(
        model_path=folder, kv_cache_dtype=dtype, dtype="float32", skip_tokenizer_init=True, **options
    ) as engine:
        given = engine.generate(
            input_ids=[list(prompt) for prompt in prompts], sampling_params={"max_new_tokens": 1},
            return_logprob=True, logprob_start_len=0, top_logprobs_num=vocabulary,
        )  # fmt: skip
    found = [place for each in given for place in each["meta_info"]["input_top_logprobs"] if place is not None]
    return np.array([[logprob for logprob, *_ in sorted(place, key=lambda one: one[1])] for place in found])


# --- speed ------------------------------------------------------------------------------------------------------------


def filled(runner: Runner) -> Runner:
    """Its pages hold what random tokens would leave: pages of zeros need not be memory."""
    random = np.random.default_rng(0)
    for pool in runner.pools.values():
        layout: Any = pool.layout
        part = random.standard_normal((PAGE, layout.kv_heads, layout.head_dim)).astype(np.float32)
        one = layout.write(
            [jnp.zeros(a.shape, a.dtype) for a in layout.buffers(1)], np.zeros(PAGE, int), np.arange(PAGE), (part, part)
        )
        fill = jax.jit(lambda buffer, page: buffer.at[:].set(page), donate_argnums=0)
        pool.buffers = [tuple(map(fill, buffers, one)) for buffers in pool.buffers]
    return runner


def stepped(runner: Runner, context: int, rows: int) -> float:
    """Seconds of a decode step of ``rows`` rows that have ``context`` tokens."""
    parts = [BatchPart(1 + row, context, np.array([100 + row])) for row in range(rows)]
    batch = Batch.build(parts, tables_of(runner, rows), 1)
    begun = time.perf_counter()
    jax.block_until_ready(runner.step(batch))
    return time.perf_counter() - begun


def speed(
    model: Model, types: Sequence[str], contexts: Sequence[int], batches: Sequence[int], rounds: int
) -> Iterator[dict[str, object]]:
    """Seconds of a decode step of each type at each context and batch, and how often float32's speed that is."""
    for rows in batches:
        wide = filled(model.runner("float32", max(contexts) + PAGE, rows))
        for name in types:
            narrow = filled(model.runner(name, max(contexts) + PAGE, rows))
            for context in contexts:
                pairs = [(stepped(wide, context, rows), stepped(narrow, context, rows)) for _ in range(rounds + 1)][1:]
                yield {
                    "type": name, "context": context, "rows": rows, "backend": narrow.programs.backend,
                    "float32_seconds": median(one for one, _ in pairs), "seconds": median(other for _, other in pairs),
                    "speed": median(one / other for one, other in pairs),
                }  # fmt: skip
            del narrow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="Folder of a checkpoint; needed but for --goldens.")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--types", help=f"Some of: {', '.join((*OURS, *OTHERS, *SCALED))} [default: all].")
    parser.add_argument("--needles", action="store_true")
    parser.add_argument("--haystacks", type=int, default=2, help="Of needles, for each context.")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--goldens", nargs="?", const="", help="Names of golden checkpoints [default: all].")
    parser.add_argument("--contexts", help="[default: 128,2000,8000; of needles 2000,8000]")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--kept", type=Path, help="A file to keep what was measured in.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    known = OURS if args.speed or args.goldens is not None else (*OURS, *OTHERS, *SCALED)
    types = known if args.types is None else args.types.split(",")
    if not set(types) <= set(known):
        parser.error(f"--types are some of {', '.join(known)}")
    if args.model_path is None and args.goldens is None:
        parser.error("--model-path is needed")
    kept = Kept(args.kept)
    contexts = [int(n) for n in (args.contexts or ("128,2000,8000" if args.speed else "2000,8000")).split(",")]
    rows: Iterable[dict[str, object]]
    if args.goldens is not None:
        rows = goldens([name for name in args.goldens.split(",") if name], types)
        line = "{golden:<24} {type:<10} KL {kl:.6f}  top-1 {top1:7.2%}  of {tokens} positions"
    elif args.speed:
        model, batches = Model(args.model_path, "float32"), [int(n) for n in args.batch.split(",")]
        rows = speed(model, types, contexts, batches, args.rounds)
        line = "{type:<10} {backend:<7} batch {rows:>2} context {context:>5}: {milliseconds:8.2f} ms {speed:6.2f}x"
    elif args.needles:
        rows = needles(Model(args.model_path), types, contexts, args.haystacks, kept)
        line = "{type:<24} context {context:>5}: {retrieved:3.0f} of {of:3.0f}, logprob of the digits {logprob:8.3f}"
    else:
        rows = quality(Model(args.model_path), types, args.tokens, args.context, kept)
        line = "{type:<24} {backend:<7} {bits:5.2f} bits  KL {kl:.6f}  top-1 {top1:7.2%}  perplexity {perplexity:.4f}"
    for row in rows:
        if "seconds" in row:
            row["milliseconds"] = row["seconds"] * 1e3
        print(json.dumps(row) if args.json else line.format(**row), flush=True)


if __name__ == "__main__":
    main()
