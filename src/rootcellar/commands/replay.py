"""``rootcellar replay``: how would the cache do on these traces?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rootcellar.cache import Tier
from rootcellar.cache.order import POLICIES
from rootcellar.commands import figure
from rootcellar.errors import ConfigError
from rootcellar.plan.capacity import KV_DTYPES, Ask, capacity
from rootcellar.plan.layers import read_architecture
from rootcellar.sim.azure import MESSAGE, parse_csv
from rootcellar.sim.replay import Outcome, Progress, optimal, replay
from rootcellar.sim.sessions import QUANTILES, Gaps, gaps
from rootcellar.sim.trace import BLOCK, BadLine, TraceRequest, parse
from rootcellar.sim.workloads import WORKLOADS, workload

GENERATED = "generated:"
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar replay``."""
    parser.usage = "rootcellar replay TRACE [TRACE ...] [options]"
    parser.description = (
        "Replay traces through the real cache without the bytes, beside the offline optimum. The share of a policy is "
        "the part of the distance from LRU, which knows of no queue, to the optimum that it comes."
    )
    generated = ", ".join(GENERATED + name for name in WORKLOADS)
    parser.add_argument(
        "trace",
        metavar="TRACE",
        nargs="+",
        help=f"Mooncake-format JSON lines (also what --record-trace wrote), one of {generated}, or Azure's CSV (a name "
        "that ends in .csv), which has no ids: who continues whom is guessed from the lengths.",
    )
    parser.add_argument(
        "--capacity", default="1M,2M,5M,10M", help="Cache sizes in tokens, as 500k,1M (default %(default)s)."
    )
    parser.add_argument(
        "--host",
        help="Tokens of host memory behind each of these, as 3M; copies take no time, and the optimum has the sum.",
    )
    parser.add_argument("--storage", help="Tokens of a store behind that.")
    parser.add_argument("--page-size", type=int, default=64, help="Tokens in a page (default %(default)s).")
    policies = ", ".join([*POLICIES, "optimal"])
    parser.add_argument(
        "--policy", default="lru,slru,adaptive", help=f"Of {policies} (default %(default)s); optimal is always added."
    )
    parser.add_argument(
        "--concurrency", type=int, default=1, help="Requests that hold their pages at a time (default %(default)s)."
    )
    parser.add_argument(
        "--queued",
        type=int,
        default=0,
        help="Requests that follow in the trace and are known to wait, but for those that go on from one that waits or "
        "runs (default %(default)s).",
    )
    parser.add_argument(
        "--output-tokens",
        default="0",
        help="Tokens that each request computes beyond its prompt: a number, or 'trace' (default %(default)s).",
    )
    parser.add_argument(
        "--block-size", type=int, default=BLOCK, help="Tokens per id of the trace (default %(default)s)."
    )
    parser.add_argument(
        "--message-tokens",
        type=int,
        default=MESSAGE,
        help="In a CSV, most tokens that a turn adds (default %(default)s).",
    )
    parser.add_argument("--limit", type=int, help="Use the first LIMIT requests only.")
    parser.add_argument("--json", action="store_true", help="Print the results as JSON.")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="Draw the miss-ratio curve: .html, .svg or .png.")
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="PATH",
        help="A model's config.json, for capacities in GB, and for what one GB more would gain.",
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=["auto", *KV_DTYPES], default="auto", help="Of the cache, for --model-config."
    )


@dataclass(frozen=True)
class PolicyRow:
    """One policy at one capacity on one trace; ``share``: of the distance from LRU to the optimum; ``seconds`` spent.

    ``gained``: what a gigabyte more adds to the hit rate; None: nobody asked.
    """

    outcome: Outcome
    share: float | None
    seconds: float
    gained: float | None


@dataclass(frozen=True)
class Replayed:
    """A trace: how many requests, which lines were passed over, the gaps of its sessions, and the rows."""

    name: str
    requests: int
    bad: list[BadLine]
    gaps: Gaps
    rows: list[PolicyRow]


def run(args: argparse.Namespace) -> int:
    """Run ``rootcellar replay``. 0 when every row was computed. Raises ``ConfigError`` for a wrong option."""
    capacities = [parse_tokens(text) for text in args.capacity.split(",")]
    policies = _policies(args.policy)
    output = None if args.output_tokens == "trace" else parse_tokens(args.output_tokens)
    for name in ("page_size", "concurrency", "block_size", "message_tokens"):
        if vars(args)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {vars(args)[name]}; give at least 1")
    if args.queued < 0:
        raise ConfigError(f"--queued is {args.queued}; give at least 0")
    if args.figure and args.figure.suffix not in (".html", ".svg", ".png"):
        raise ConfigError(f"--figure {args.figure}: the name must end in .html, .svg or .png")
    if args.figure and len(args.trace) > 1:
        raise ConfigError("--figure draws one trace; give one")
    if args.storage and not args.host:
        raise ConfigError("--storage is behind --host: give both")
    token_bytes = _token_bytes(args)
    replayed = []
    for name in args.trace:
        requests, bad = _read(args, name)
        for line in bad:
            print(f"{name}:{line.line}: skipped: {line.reason}", file=sys.stderr)
        rows = _rows(args, requests, capacities, policies, output, token_bytes)
        replayed.append(Replayed(name, len(requests), bad, gaps(requests), rows))
    if args.json:
        found = [_fields(each) for each in replayed]
        print(json.dumps(found[0] if len(found) == 1 else found))
    else:
        for each in replayed:
            _print(each, token_bytes)
    if args.figure:
        _draw(args, [row.outcome for row in replayed[0].rows], token_bytes)
    return 0


def _rows(
    args: argparse.Namespace,
    requests: Sequence[TraceRequest],
    capacities: Sequence[int],
    policies: Sequence[str],
    output: int | None,
    token_bytes: float | None,
) -> list[PolicyRow]:
    """The rows of one trace; for the shares LRU is computed too, which knows of no queue."""
    rows: list[PolicyRow] = []
    blind = args.queued > 0 or "lru" not in policies
    more = None if token_bytes is None else int(1e9 / token_bytes)
    replays = blind + len(policies) * (1 if more is None else 2)
    with _progress(len(capacities) * replays * len(requests)) as tell:
        for capacity in capacities:
            found: dict[str, tuple[Outcome, float, float | None]] = {}
            for policy in policies:
                begin = perf_counter()
                outcome = _row(args, requests, capacity, policy, output, tell)
                seconds = perf_counter() - begin
                gained = None
                if more is not None:
                    larger = _row(args, requests, capacity + more, policy, output, tell)
                    gained = larger.hit_rate - outcome.hit_rate
                found[policy] = outcome, seconds, gained
            lru = _row(args, requests, capacity, "lru", output, tell, queued=0) if blind else found["lru"][0]
            least, best = lru.hit_rate, found["optimal"][0].hit_rate
            for policy in policies:
                outcome, seconds, gained = found[policy]
                share = (outcome.hit_rate - least) / (best - least) if best > least else None
                rows.append(PolicyRow(outcome, share, seconds, gained))
    return rows


def _row(
    args: argparse.Namespace,
    requests: Sequence[TraceRequest],
    capacity: int,
    policy: str,
    output: int | None,
    tell: Progress,
    queued: int | None = None,
) -> Outcome:
    """One replay, with the queue that was asked for unless ``queued`` says another."""
    farther = {tier: parse_tokens(t) for tier, t in ((Tier.HOST, args.host), (Tier.STORAGE, args.storage)) if t}
    if policy == "optimal":  # which need not keep on a tier what is on another
        outcome = optimal(requests, capacity=capacity + sum(farther.values()), block=args.block_size)
        tell(len(requests))
        return replace(outcome, capacity_tokens=capacity)
    return replay(
        requests,
        capacity=capacity,
        page_size=args.page_size,
        policy=policy,
        concurrency=args.concurrency,
        output_tokens=output,
        block=args.block_size,
        farther=farther,
        queued=args.queued if queued is None else queued,
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


def _read(args: argparse.Namespace, name: str) -> tuple[list[TraceRequest], list[BadLine]]:
    if name.startswith(GENERATED):
        return workload(name.removeprefix(GENERATED))[: args.limit], []
    try:
        with open(name, encoding="utf-8", errors="replace") as lines:
            if name.endswith(".csv"):
                requests, bad = parse_csv(lines, args.block_size, args.message_tokens)
            else:
                requests, bad = parse(lines, args.block_size)
    except OSError as error:
        raise ConfigError(f"the trace {name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"the trace {name} cannot be read: {error}") from None
    if not requests:
        first = f" (line {bad[0].line}: {bad[0].reason})" if bad else ""
        raise ConfigError(f"{name} has no request that can be replayed{first}")
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


def _fields(each: Replayed) -> dict[str, Any]:
    """A trace's rows as JSON has them."""
    results = [
        {
            "capacity_tokens": row.outcome.capacity_tokens,
            "policy": row.outcome.policy,
            "page_size": row.outcome.page_size,
            "hit_rate": row.outcome.hit_rate,
            "hit_tokens": row.outcome.hit_tokens,
            "input_tokens": row.outcome.input_tokens,
            "evicted_tokens": row.outcome.evicted_tokens,
            "hit_tokens_by_tier": {tier.name.lower(): tokens for tier, tokens in row.outcome.by_tier.items()},
            "refused_requests": row.outcome.refused,
            "share_of_distance": row.share,
            "seconds": round(row.seconds, 3),
            "ms_per_request": round(1e3 * row.seconds / each.requests, 4),
            "gained_by_1_gb": row.gained,
        }
        for row in each.rows
    ]
    skipped = [{"line": line.line, "reason": line.reason} for line in each.bad]
    return {
        "trace": each.name,
        "requests": each.requests,
        "skipped": skipped,
        "gaps": {"turns": each.gaps.turns, "tokens": each.gaps.tokens, "seconds": each.gaps.seconds},
        "results": results,
    }


def _print(each: Replayed, token_bytes: float | None) -> None:
    tokens = each.rows[0].outcome.input_tokens
    print(f"{each.requests} requests of {each.name}, {tokens:,} input tokens, {len(each.bad)} lines skipped")
    if each.gaps.turns:
        names = [f"{100 * q:.0f} %" for q in QUANTILES]
        print(f"{each.gaps.turns} go on with an earlier one; before them, at {', '.join(names)} of them,")
        print(f"  tokens of other prompts: {', '.join(map(figure.short, each.gaps.tokens))}")
        if each.gaps.seconds:
            print(f"  seconds: {', '.join(f'{s:g}' for s in each.gaps.seconds)}")
    unit, more = ("GB", "+1 GB") if token_bytes else ("", "")
    print(
        f"{'capacity':>9} {unit:>8} {'policy':<10} {'hit rate':>9} {'share':>7} {more:>8} {'evicted':>14} "
        f"{'seconds':>8} {'ms/request':>11}"
    )
    for row in each.rows:
        outcome = row.outcome
        gigabytes = f"{outcome.capacity_tokens * token_bytes / 1e9:.2f}" if token_bytes else ""
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        gained = "" if row.gained is None else f"{100 * row.gained:+.2f}"
        print(
            f"{figure.short(outcome.capacity_tokens):>9} {gigabytes:>8} {outcome.policy:<10} "
            f"{100 * outcome.hit_rate:>7.2f} % {share:>7} {gained:>8} {outcome.evicted_tokens:>14,} "
            f"{row.seconds:>8.1f} {1e3 * row.seconds / each.requests:>11.3f}"
            + "".join(f"  {t.name.lower()} {100 * n / outcome.input_tokens:.2f} %" for t, n in outcome.by_tier.items())
            + (f"  {outcome.refused} requests never fit" if outcome.refused else "")
        )


def _draw(args: argparse.Namespace, outcomes: Sequence[Outcome], token_bytes: float | None) -> None:
    title = f"Miss ratio of {Path(args.trace[0]).name}"
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
