"""The cache benchmark runs: every micro, scaling and memory row has a figure, on the core that is always there."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_cache_benchmark_measures_every_row():
    words = ["--quick", "--json", "--pages", "16", "--rounds", "1", "--seconds", "0.01", "--sides", "rootcellar python"]
    command = [sys.executable, str(ROOT / "benchmarks" / "cache_core.py"), *words, "--groups", "micro,scaling"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["row"] for row in rows} >= {"decode 256 requests", "memcpy of its slots"}
    for row in rows:
        (found,) = row["sides"].values()
        assert found["median"] > 0, row
