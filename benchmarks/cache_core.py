"""The cache core, without a model, beside the cores of SGLang and vLLM: micro rows, a trace, scaling, memory.

    python benchmarks/cache_core.py [--trace TRACE] [--peer-python PYTHON] [--groups micro,trace,...] [--json]
    python benchmarks/cache_core.py --callgrind

Each side runs in a process of its own (``core_worker.py``): rootcellar with its native core, rootcellar with its
Python core, and where ``--peer-python`` has their wheels SGLang's Rust core, SGLang's Python core with its allocator,
and vLLM's manager. For each row all sides get ready, then they are measured in turn, some samples a round, so that all
see the same load of the machine. Medians. docs/cache.md says how to install the peers and what each row includes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core_callgrind
import core_report

WORKER = Path(__file__).with_name("core_worker.py")
GROUPS = ("micro", "trace", "scaling", "memory")
PEERS = ("sglang-rust", "sglang-python", "vllm")
MOST = 2000  # samples of a visit
# No side needs more, and threads that wait for work by spinning slow down whoever is measured next.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Row:
    """A row of the report: what a side is asked to make ready, and how to show it."""

    title: str
    name: str
    arguments: dict[str, Any]
    fresh: bool = False  # in processes that did nothing before

    @property
    def unit(self) -> str:
        return {"trace": "requests/s", "memory": "bytes"}.get(self.name, "us")


class Side:
    """A worker process, asked over its standard input and output."""

    def __init__(self, name: str, python: str, variables: dict[str, str]) -> None:
        self.name = name
        self.python = python
        self.variables = variables
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.python, str(WORKER), self.name.removesuffix(" python")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD | self.variables,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer; a process that died is started again for the next row."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.start()
        return {"error": f"the process ended with {code}"}

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- what is measured -----------------------------------------------------------------------------------------------


def micro(pages: list[int], quick: bool) -> Iterator[Row]:
    for page in pages:
        at = {"page_size": page}
        for nodes in (1, 64):
            yield Row(
                f"match 8,192 tokens over {nodes} node{'s'[: nodes > 1]}, with slots", "match", at | {"nodes": nodes}
            )
        yield Row("insert 8,192 tokens, half shared", "insert", at | {"twice": False})
        yield Row("insert 8,192 tokens, half computed twice", "insert", at | {"twice": True})
        for leaves in (500, 20_000) if quick or page > 1 else (500, 20_000, 1_000_000):
            yield Row(f"evict one leaf of {leaves:,}", "evict", at | {"leaves": leaves})
        yield Row("allocate and free 4,096 slots", "slots", at | {"count": 4096})
        yield Row("free one slot (page) of a 2M pool", "give one", at)
        for title, table in (("", True), (", SGLang's allocator alone", False)):
            yield Row(f"extend 32 requests by 256 tokens{title}", "extend", at | {"table": table})
            yield Row(f"decode 256 requests{title}", "decode", at | {"table": table})


def trace(pages: list[int], path: str | None) -> Iterator[Row]:
    if path is None:
        print("the trace is left out: give --trace or set ROOTCELLAR_TRACE", file=sys.stderr)
        return
    for page in pages:
        at = {"page_size": page, "path": path}
        yield Row("trace", "trace", at | {"slots": True})
        yield Row("trace, SGLang without its allocator", "trace", at | {"slots": False})
        yield Row("trace, prompts that may change, so copied", "trace", at | {"frozen": False})
        if page > 1:
            yield Row("trace, digests of all pages", "trace", at | {"names": True})


def scaling(page: int, quick: bool) -> Iterator[Row]:
    for what in ("match", "insert", "evict"):
        for cached in (1 << 10, 10 << 10, 100 << 10, 1000 << 10, 10_000 << 10)[: 3 if quick else 5]:
            title = f"{what} 1,024 tokens with {cached >> 10:,}k cached"
            yield Row(title, "scaling", {"page_size": page, "what": what, "tokens_cached": cached})


def memory(page: int) -> Iterator[Row]:
    for entry in (4096, page):
        title = f"2M tokens cached in entries of {entry:,}"
        yield Row(title, "memory", {"page_size": page, "tokens_cached": 2_000_000, "entry": entry}, fresh=True)


def floor(sizes: dict[int, int]) -> Iterator[Row]:
    """What a match of 8,192 tokens in one node cannot be faster than, given the bytes of slots by page size."""
    yield Row("one call of an empty Python function", "floor", {"page_size": 0, "what": "call", "size": 0})
    for page, size in sizes.items():
        yield Row("memcmp of the key", "floor", {"page_size": page, "what": "memcmp", "size": 8192 * 8})
        yield Row("memcpy of its slots", "floor", {"page_size": page, "what": "memcpy", "size": size})


# ---- measuring ------------------------------------------------------------------------------------------------------


def run(row: Row, sides: list[Side], rounds: int, seconds: float) -> dict[str, Any]:
    """``{side: {"median": in the row's unit, "samples": n, **facts} | {"skip": why} | {"error": why}}``."""
    if row.fresh:
        for side in sides:
            side.stop()
            side.start()
    found = {side.name: side.ask(prepare=row.name, arguments=row.arguments) for side in sides}
    ready = [side for side in sides if not found[side.name]]
    samples: dict[str, list[float]] = {side.name: [] for side in ready}
    for turn in range(1 if row.fresh else rounds):
        for side in ready if turn % 2 == 0 else ready[::-1]:
            reply = side.ask(measure=seconds, most=MOST)
            if "error" not in found[side.name]:
                found[side.name] = {"error": reply["error"]} if "error" in reply else dict(reply["facts"])
            samples[side.name] += reply.get("samples", [])
        ready = [side for side in ready if "error" not in found[side.name]]
    for side in ready:
        mine = found[side.name]
        median = statistics.median(samples[side.name])
        mine["median"] = {"requests/s": 1e6 * mine.get("requests", 0) / median, "bytes": mine.get("bytes")}.get(
            row.unit, median
        )
        mine["samples"] = len(samples[side.name])
    return {"row": row.title, "unit": row.unit, **row.arguments, "sides": found}


def open_sides(peer_python: str | None, wanted: list[str]) -> list[Side]:
    """The sides there are; says which are not, and why."""
    sides = [Side("rootcellar python", sys.executable, {"ROOTCELLAR_NO_NATIVE": "1"})]
    native = Side("rootcellar", sys.executable, {"ROOTCELLAR_NO_NATIVE": ""})
    if native.ask(prepare="native", arguments={}):
        print("the native core is left out: it is not built", file=sys.stderr)
        native.stop()
    else:
        sides.insert(0, native)
    if peer_python is None:
        print("SGLang and vLLM are left out: give --peer-python", file=sys.stderr)
    else:
        sides += [Side(name, peer_python, {}) for name in PEERS]
    for side in list(sides):
        if wanted and side.name not in wanted:
            side.stop()
            sides.remove(side)
    return sides


def rows_of(group: str, arguments: argparse.Namespace) -> Iterator[Row]:
    pages = [int(page) for page in arguments.pages.split(",")]
    if group == "micro":
        return micro(pages, arguments.quick)
    if group == "trace":
        return trace(pages, arguments.trace)
    return scaling(16, arguments.quick) if group == "scaling" else memory(16)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", default=os.environ.get("ROOTCELLAR_TRACE"), help="Mooncake's conversation trace")
    parser.add_argument("--peer-python", help="an interpreter that has the peers' wheels")
    parser.add_argument(
        "--sides", default="", help="only these, by comma: rootcellar,rootcellar python,sglang-rust,..."
    )
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--pages", default="1,16,64", help="page sizes of the micro and trace rows")
    parser.add_argument("--rounds", type=int, default=5, help="visits to each side per row")
    parser.add_argument("--seconds", type=float, default=0.2, help="of samples per visit")
    parser.add_argument("--quick", action="store_true", help="without the largest caches")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    parser.add_argument("--callgrind", action="store_true", help="count instructions of fixed workloads instead")
    return parser


def main() -> None:
    arguments = options().parse_args()
    if arguments.callgrind:
        core_report.show_counts(core_callgrind.count_all(), arguments.json)
        return
    sides = open_sides(arguments.peer_python, [name for name in arguments.sides.split(",") if name])
    results = []
    try:
        for group in arguments.groups.split(","):
            for row in rows_of(group, arguments):
                results.append(run(row, sides, arguments.rounds, arguments.seconds))
                if not arguments.json:
                    core_report.show(results[-1])
        sizes = core_report.slot_bytes(results)
        results += [run(row, sides[:1], arguments.rounds, arguments.seconds) for row in floor(sizes)]
    finally:
        for side in sides:
            side.stop()
    if arguments.json:
        print(json.dumps({"machine": core_report.machine(), "rows": results}, indent=1))
    else:
        core_report.summary(results)


if __name__ == "__main__":
    main()
