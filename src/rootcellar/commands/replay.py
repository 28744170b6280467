"""``rootcellar replay``: how would the cache do on this trace?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from rootcellar.cache.order import POLICIES
from rootcellar.commands import figure
from rootcellar.errors import ConfigError
from rootcellar.plan.capacity import KV_DTYPES, Ask, capacity
from rootcellar.plan.layers import read_architecture
from rootcellar.sim.replay import Outcome, Progress, optimal, replay
from rootcellar.sim.trace import BLOCK, BadLine, TraceRequest, parse
from rootcellar.sim.workloads import WORKLOADS, workload

GENERATED = "generated:"
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar replay``."""
    parser.usage = "rootcellar replay TRACE [options]"
    parser.description = "Replay a trace through the real cache without the bytes, beside the offline optimum."
    generated = ", ".join(GENERATED + name for name in WORKLOADS)
    parser.add_argument("trace", metavar="TRACE", help=f"Mooncake-format JSON lines, or one of {generated}.")
    parser.add_argument(
        "--capacity", default="1M,2M,5M,10M", help="Cache sizes in tokens, as 500k,1M (default %(default)s)."
    )
    parser.add_argument("--page-size", type=int, default=64, help="Tokens in a page (default %(default)s).")
    policies = ", ".join([*POLICIES, "optimal"])
    parser.add_argument(
        "--policy", default="lru,slru,adaptive", help=f"Of {policies} (default %(default)s); optimal is always added."
    )
    parser.add_argument(
        "--concurrency", type=int, default=1, help="Requests that hold their pages at a time (default %(default)s)."
    )
    parser.add_argument(
        "--output-tokens",
        default="0",
        help="Tokens that each request computes beyond its prompt: a number, or 'trace' (default %(default)s).",
    )
    parser.add_argument(
        "--block-size", type=int, default=BLOCK, help="Tokens per id of the trace (default %(default)s)."
    )
    parser.add_argument("--limit", type=int, help="Use the first LIMIT requests only.")
    parser.add_argument("--json", action="store_true", help="Print the results as JSON.")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="Draw the miss-ratio curve: .html, .svg or .png.")
    parser.add_argument(
        "--model-config", type=Path, metavar="PATH", help="A model's config.json, for capacities in GB."
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=["auto", *KV_DTYPES], default="auto", help="Of the cache, for --model-config."
    )


def run(args: argparse.Namespace) -> int:
    """Run ``rootcellar replay``. 0 when every row was computed. Raises ``ConfigError`` for a wrong option."""
    capacities = [parse_tokens(text) for text in args.capacity.split(",")]
    policies = _policies(args.policy)
    output = None if args.output_tokens == "trace" else parse_tokens(args.output_tokens)
    for name in ("page_size", "concurrency", "block_size"):
        if vars(args)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {vars(args)[name]}; give at least 1")
    if args.figure and args.figure.suffix not in (".html", ".svg", ".png"):
        raise ConfigError(f"--figure {args.figure}: the name must end in .html, .svg or .png")
    token_bytes = _token_bytes(args)
    requests, bad = _read(args)
    for line in bad:
        print(f"{args.trace}:{line.line}: skipped: {line.reason}", file=sys.stderr)
    rows: list[tuple[Outcome, float]] = []
    with _progress(len(capacities) * len(policies) * len(requests)) as tell:
        for capacity in capacities:
            for policy in policies:
                begin = perf_counter()
                outcome = _row(args, requests, capacity, policy, output, tell)
                rows.append((outcome, perf_counter() - begin))
    _report(args, rows, bad, len(requests), token_bytes)
    if args.figure:
        _draw(args, [outcome for outcome, _ in rows], token_bytes)
    return 0


def _row(
    args: argparse.Namespace,
    requests: Sequence[TraceRequest],
    capacity: int,
    policy: str,
    output: int | None,
    tell: Progress,
) -> Outcome:
    if policy == "optimal":
        outcome = optimal(requests, capacity=capacity, block=args.block_size)
        tell(len(requests))
        return outcome
    return replay(
        requests,
        capacity=capacity,
        page_size=args.page_size,
        policy=policy,
        concurrency=args.concurrency,
        output_tokens=output,
        block=args.block_size,
        progress=tell,
    )


def parse_tokens(text: str) -> int:
    """``1M`` as a number of tokens."""
    word = text.strip().lower()
    unit = word[-1:] if word[-1:] in ("k", "m", "g") else ""
    try:
        count = float(word.removesuffix(unit)) * SUFFIXES[unit]
    except ValueError:
        raise ConfigError(f"{text!r} is not a number of tokens; write 500000, 500k or 1.5M") from None
    if count < 0 or count != int(count):
        raise ConfigError(f"{text!r} is not a whole number of tokens")
    return int(count)


def _policies(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES and name != "optimal":
            raise ConfigError(f"--policy {name!r} is unknown; choose from {', '.join([*POLICIES, 'optimal'])}")
    return [*dict.fromkeys([name for name in names if name != "optimal"]), "optimal"]


def _read(args: argparse.Namespace) -> tuple[list[TraceRequest], list[BadLine]]:
    if args.trace.startswith(GENERATED):
        return workload(args.trace.removeprefix(GENERATED))[: args.limit], []
    try:
        with open(args.trace, encoding="utf-8", errors="replace") as lines:
            requests, bad = parse(lines, args.block_size)
    except OSError as error:
        raise ConfigError(f"the trace {args.trace} cannot be read: {error.strerror}") from None
    if not requests:
        first = f" (line {bad[0].line}: {bad[0].reason})" if bad else ""
        raise ConfigError(f"{args.trace} has no request that can be replayed{first}")
    return requests[: args.limit], bad


def _token_bytes(args: argparse.Namespace) -> float | None:
    if args.model_config is None:
        return None
    try:
        config = json.loads(args.model_config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--model-config {args.model_config} cannot be read: {error}") from None
    return capacity(Ask(read_architecture(config), kv_cache_dtype=args.kv_cache_dtype)).bytes_per_token_full


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A progress bar over all rows on a terminal, nothing elsewhere. Rows report how far they are."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # needed on a terminal only
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replaying", total=total)
        done = last = 0

        def tell(requests: int) -> None:
            nonlocal done, last
            done += requests - last if requests > last else requests
            last = requests
            bar.update(task, completed=done)

        yield tell


def _report(
    args: argparse.Namespace,
    rows: Sequence[tuple[Outcome, float]],
    bad: Sequence[BadLine],
    requests: int,
    token_bytes: float | None,
) -> None:
    if args.json:
        results = [
            {
                "capacity_tokens": outcome.capacity_tokens,
                "policy": outcome.policy,
                "page_size": outcome.page_size,
                "hit_rate": outcome.hit_rate,
                "hit_tokens": outcome.hit_tokens,
                "input_tokens": outcome.input_tokens,
                "evicted_tokens": outcome.evicted_tokens,
                "refused_requests": outcome.refused,
                "seconds": round(seconds, 3),
            }
            for outcome, seconds in rows
        ]
        skipped = [{"line": line.line, "reason": line.reason} for line in bad]
        print(json.dumps({"trace": args.trace, "requests": requests, "skipped": skipped, "results": results}))
        return
    print(f"{requests} requests of {args.trace}, {rows[0][0].input_tokens:,} input tokens, {len(bad)} lines skipped")
    unit = "GB" if token_bytes else ""
    print(f"{'capacity':>9} {unit:>8} {'policy':<10} {'hit rate':>9} {'evicted':>14} {'seconds':>8}")
    for outcome, seconds in rows:
        gigabytes = f"{outcome.capacity_tokens * token_bytes / 1e9:.2f}" if token_bytes else ""
        print(
            f"{figure.short(outcome.capacity_tokens):>9} {gigabytes:>8} {outcome.policy:<10} "
            f"{100 * outcome.hit_rate:>7.2f} % {outcome.evicted_tokens:>14,} {seconds:>8.1f}"
            + (f"  {outcome.refused} requests never fit" if outcome.refused else "")
        )


def _draw(args: argparse.Namespace, outcomes: Sequence[Outcome], token_bytes: float | None) -> None:
    title = f"Miss ratio of {Path(args.trace).name}"
    if args.figure.suffix == ".png":
        try:
            figure.to_png(outcomes, title, str(args.figure), token_bytes)
        except ImportError:
            raise ConfigError(
                "--figure to .png needs matplotlib: pip install 'rootcellar[figure]', or use .html"
            ) from None
        return
    svg = args.figure.suffix == ".svg"
    drawing = figure.to_svg(outcomes, token_bytes) if svg else figure.to_html(outcomes, title, token_bytes)
    args.figure.write_text(drawing, encoding="utf-8")
