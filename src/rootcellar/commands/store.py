"""``rootcellar store``: look at the folder of a file store, verify it, make it smaller."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rootcellar.errors import ConfigError
from rootcellar.tiers.stores.audit import Damage, Holding, damages, holdings, prune
from rootcellar.units import gb, parse_bytes

EXIT_DAMAGED = 1
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``rootcellar store``."""
    parser.usage = "rootcellar store ls|check|prune PATH [options]"
    parser.description = (
        "Look at the folder of a file store (ls), read and verify every page (check: status 1 if one is damaged), or "
        "take away what was not used for longest (prune). Looking is allowed while a server writes."
    )
    parser.add_argument("action", choices=["ls", "check", "prune"], metavar="ls|check|prune")
    parser.add_argument("path", type=Path, metavar="PATH", help="The store's folder.")
    parser.add_argument("--mend", action="store_true", help="check: forget damaged pages and unreadable files.")
    parser.add_argument("--max-size", metavar="SIZE", help="prune: keep at most so much, as 100GB; 0 for nothing.")
    parser.add_argument("--older-than", metavar="AGE", help="prune: what was not used for so long, as 90m, 12h or 30d.")
    parser.add_argument("--json", action="store_true", help="Print the results as JSON.")


def run(args: argparse.Namespace) -> int:
    """Run ``rootcellar store``. Raises ``ConfigError`` for a wrong option, and when another process writes."""
    if args.mend and args.action != "check":
        raise ConfigError("--mend belongs to check")
    if (args.max_size or args.older_than) and args.action != "prune":
        raise ConfigError("--max-size and --older-than belong to prune")
    if args.action == "ls":
        return _ls(args)
    if args.action == "check":
        return _check(args)
    return _prune(args)


def _ls(args: argparse.Namespace) -> int:
    found = holdings(args.path)
    if args.json:
        print(json.dumps([asdict(holding) | {"path": str(holding.path)} for holding in found]))
        return 0
    groups: dict[tuple[str, int], list[Holding]] = defaultdict(list)
    for holding in found:
        if not holding.unreadable:
            groups[holding.identity, holding.slot_bytes].append(holding)
    print(
        f"{'pages':>10} {'of':>10} {'GB':>8} {'GB on disk':>11} {'oldest':>8} {'used':>8}  {'slot bytes':>11}  identity"
    )
    for (identity, slot_bytes), files in sorted(groups.items()):
        oldest = [holding.oldest for holding in files if holding.oldest is not None]
        used = [holding.last_used for holding in files if holding.last_used is not None]
        print(
            f"{sum(f.pages for f in files):>10,} {sum(f.slots for f in files):>10,} "
            f"{gb(sum(f.page_bytes for f in files)):>8} {gb(sum(f.file_bytes for f in files)):>11} "
            f"{_age(min(oldest, default=None)):>8} {_age(max(used, default=None)):>8}  {slot_bytes:>11,}  "
            f"{identity or '-'}"
        )
    for holding in found:
        if holding.unreadable:
            print(f"{holding.path}: {gb(holding.file_bytes)} GB, not read: {holding.unreadable}")
    return 0


def _check(args: argparse.Namespace) -> int:
    bad: list[Damage] = []
    pages = 0
    for found in damages(args.path, args.mend):
        if isinstance(found, int):
            pages += found
            continue
        bad.append(found)
        if not args.json:
            where = f"slot {found.slot}, page {found.name}: " if found.slot is not None else ""
            print(f"{found.path}: {where}{found.why}")
    if args.json:
        rows = [asdict(damage) | {"path": str(damage.path)} for damage in bad]
        print(json.dumps({"pages": pages, "damaged": rows, "mended": args.mend}))
    else:
        mended = ", and forgotten" if args.mend and bad else ""
        print(f"{pages:,} pages read, {len(bad):,} damaged{mended}")
    return EXIT_DAMAGED if bad and not args.mend else 0


def _prune(args: argparse.Namespace) -> int:
    if args.max_size is None and args.older_than is None:
        raise ConfigError("prune needs --max-size or --older-than")
    max_size = None
    if args.max_size is not None:
        max_size = 0 if args.max_size.strip() == "0" else parse_bytes(args.max_size, "--max-size")
    before = None if args.older_than is None else time.time() - _seconds(args.older_than)
    pages, nbytes = prune(args.path, max_size, before)
    if args.json:
        print(json.dumps({"pages": pages, "file_bytes": nbytes}))
    else:
        print(f"{pages:,} pages are gone, and {gb(nbytes)} GB of files")
    return 0


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]+\.?[0-9]*)\s*([smhd])", text.strip())
    if found is None:
        raise ConfigError(f"--older-than={text!r} is not a time: write it like 90m, 12h or 30d")
    return float(found[1]) * _SECONDS[found[2]]


def _age(when: float | None) -> str:
    """How long ago, in the largest unit that shows two digits or so."""
    if when is None:
        return "-"
    seconds = max(0.0, time.time() - when)
    units: Sequence[tuple[str, int]] = sorted(_SECONDS.items(), key=lambda unit: -unit[1])
    letter, size = next((unit for unit in units if seconds >= 2 * unit[1]), ("s", 1))
    return f"{seconds / size:.0f} {letter}"
