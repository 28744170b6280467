"""``rootcellar bench``: prefill and decode tokens/s at two batch sizes, time to first token cold and cached.

Everything is measured through the engine, overheads included, after a warm-up of the same shapes. Each figure is the
median of ``--repeat`` runs.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rootcellar.config import EngineConfig
from rootcellar.engine.engine import Engine
from rootcellar.errors import RequestError
from rootcellar.options import add_arguments, given

# Of the long prompt, so many tokens at the end are new when its cached time to first token is measured.
_FRESH = 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar bench``."""
    group = parser.add_argument_group("bench")
    group.add_argument("--batch-sizes", default="1,16", help="Batch sizes, separated by commas (default: 1,16).")
    group.add_argument("--input-len", type=int, default=128, help="Prompt tokens of a request (default: 128).")
    group.add_argument("--output-len", type=int, default=64, help="Tokens to generate (default: 64).")
    group.add_argument(
        "--long-len", type=int, default=2000, help="Prompt tokens for the time to first token (default: 2000)."
    )
    group.add_argument("--repeat", type=int, default=3, help="Runs, of which the median counts (default: 3).")
    group.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    add_arguments(parser, EngineConfig, "engine")


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    try:
        sizes = [int(x) for x in args.batch_sizes.split(",")]
    except ValueError:
        raise RequestError(f"--batch-sizes must be numbers separated by commas, not {args.batch_sizes!r}") from None
    if min([*sizes, args.input_len, args.repeat]) < 1 or args.output_len < 2 or args.long_len <= _FRESH:
        raise RequestError(
            f"bench needs batch sizes, --input-len and --repeat of at least 1, --output-len of at least 2 and "
            f"--long-len above {_FRESH}"
        )
    with Engine(**given(args, EngineConfig)) as engine:
        result = measure(
            engine,
            batch_sizes=sizes,
            input_len=args.input_len,
            output_len=args.output_len,
            long_len=args.long_len,
            repeat=args.repeat,
        )
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    return 0


class _Prompts:
    """Random prompts that share nothing with each other: each begins differently."""

    def __init__(self, vocab: int) -> None:
        self._rng = np.random.default_rng(0)
        self._vocab = vocab

    def take(self, n: int, length: int) -> list[list[int]]:
        return [self._rng.integers(0, self._vocab, length).tolist() for _ in range(n)]


def measure(
    engine: Engine, *, batch_sizes: list[int], input_len: int, output_len: int, long_len: int, repeat: int
) -> dict[str, Any]:
    """The figures of :func:`run`: tokens/s and seconds, lengths in tokens.

    ``long_len`` is cut to what the engine's context and cache hold.
    """
    prompts = _Prompts(engine.vocab_size)
    long_len = min(long_len, engine.longest_prompt - 1)
    rows = []
    for size in batch_sizes:
        runs = []
        for _ in range(repeat + 1):  # the first warms up
            engine.flush_cache()
            runs.append(_batch(engine, prompts.take(size, input_len), output_len))
        figures = {name: median(r[name] for r in runs[1:]) for name in runs[0]}
        rows.append({"batch_size": size, "input_len": input_len, "output_len": output_len, **figures})
    pairs = []
    for _ in range(repeat + 1):
        engine.flush_cache()
        pairs.append(_first_token(engine, prompts, long_len))
    cold = median(cold for cold, _ in pairs[1:])
    cached = median(cached for _, cached in pairs[1:])
    return {
        "model": engine.config.model_path,
        "attention_backend": engine.attention_backend,
        "page_size": engine.config.page_size,
        "batches": rows,
        "time_to_first_token": {
            "prompt_tokens": long_len,
            "cold_seconds": cold,
            "cached_seconds": cached,
            "cached_over_cold": cached / cold,
        },
    }


def _batch(engine: Engine, prompts: list[list[int]], output_len: int) -> dict[str, float]:
    """Prefill, then decode from the cached prompts, so that all rows decode together from the first token on."""
    done = _run(engine, prompts, 1)
    prefill = max(r["meta_info"]["e2e_latency"] for r in done)
    done = _run(engine, prompts, output_len)
    begin = max(r["meta_info"]["first_token_latency"] for r in done)
    decode = max(r["meta_info"]["e2e_latency"] for r in done) - begin
    return {
        "prefill_tokens_per_second": sum(len(p) for p in prompts) / prefill,
        "decode_tokens_per_second": len(prompts) * (output_len - 1) / decode,
    }


def _first_token(engine: Engine, prompts: _Prompts, length: int) -> tuple[float, float]:
    """Seconds to the first token of a prompt that is new, and of one that differs from it at its end only."""
    prompt = prompts.take(1, length)[0]
    changed = prompt[:-_FRESH] + [(t + 1) % engine.vocab_size for t in prompt[-_FRESH:]]
    cold, cached = (_run(engine, [p], 1)[0]["meta_info"]["first_token_latency"] for p in (prompt, changed))
    return cold, cached


def _run(engine: Engine, prompts: list[list[int]], output_len: int) -> list[dict[str, Any]]:
    settings = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
    return engine.generate(input_ids=prompts, sampling_params=settings)  # type: ignore[return-value]


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}, {result['attention_backend']} attention, pages of {result['page_size']}")
    for name in ("batch", "prompt", "answer", "prefill tokens/s", "decode tokens/s"):
        table.add_column(name, justify="right")
    for row in result["batches"]:
        table.add_row(
            str(row["batch_size"]),
            str(row["input_len"]),
            str(row["output_len"]),
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
        )
    ttft = result["time_to_first_token"]
    console = Console()
    console.print(table)
    console.print(
        f"time to first token of {ttft['prompt_tokens']:,} tokens: {ttft['cold_seconds'] * 1e3:.1f} ms cold, "
        f"{ttft['cached_seconds'] * 1e3:.1f} ms with all but {_FRESH} cached ({ttft['cached_over_cold']:.1%})"
    )
