"""Instructions of fixed workloads of the core: a figure that no other process on the machine can change.

    python benchmarks/cache_core.py --callgrind      (needs valgrind)

Each workload runs twice under ``valgrind --tool=callgrind``, once with more repeats; the difference is what the repeats
cost, the interpreter's share of them included, start-up and filling left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Of core_ours.py, with what makes a sample ready where that is not free: an insert is two whole requests, the second
# of which shares the first's tokens, and extending begins with 32 new leases.
WORKLOADS = {
    "match 8,192 tokens, 1 node": ("match", {"page_size": 16, "nodes": 1}, 50),
    "match 8,192 tokens, 64 nodes": ("match", {"page_size": 16, "nodes": 64}, 50),
    "two requests of 4,096 and 8,192 tokens": ("insert", {"page_size": 16, "twice": False}, 20),
    "evict one leaf of 500": ("evict", {"page_size": 16, "leaves": 500}, 20),
    "allocate and free 4,096 slots": ("slots", {"page_size": 16, "count": 4096}, 50),
    "extend 32 requests by 256 tokens": ("extend", {"page_size": 16, "table": True}, 10),
    "decode 256 requests": ("decode", {"page_size": 16, "table": True}, 20),
}


def repeat(name: str, times: int) -> None:
    """Run a workload, in this process."""
    import core_ours
    import core_tasks

    row, arguments, most = WORKLOADS[name]
    # Keys are made before, the same number whatever the repeats, so that they are not in the difference.
    ready = {seed: core_tasks.tokens(seed, core_tasks.KEY // 2) for seed in range(1, 3 * most + 2)}
    core_ours.tokens = lambda seed, length: (
        ready[seed] if length == core_tasks.KEY // 2 and seed in ready else core_tasks.tokens(seed, length)
    )
    task = core_ours.ROWS[row](**arguments)
    for _ in range(times):
        task.action(task.before())


def instructions(name: str, times: int) -> int:
    """Instructions of a process that runs a workload."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", sys.executable, __file__]
        done = subprocess.run(
            [*command, name, str(times)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise SystemExit(f"{name} failed under valgrind:\n{done.stderr[-2000:]}")
        found = re.search(r"^summary: (\d+)", Path(folder, "out").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1])


def count_all() -> dict[str, int]:
    """Instructions of one repeat of each workload."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed (Debian: apt install valgrind)")
    counts = {}
    for name, (_, _, times) in WORKLOADS.items():
        counts[name] = (instructions(name, 3 * times) - instructions(name, times)) // (2 * times)
        print(f"{name}: {counts[name]:,}", file=sys.stderr)
    return counts


if __name__ == "__main__":
    repeat(sys.argv[1], int(sys.argv[2]))
