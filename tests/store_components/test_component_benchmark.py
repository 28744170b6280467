"""The benchmark of stores runs on each component."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stores_are_measured_beside_memcpy(component, request):
    name = request.config.getoption("--component")
    words = ["--stores", f"{name},nothing", "--rounds", "1", "--mib", "4", "--json"]
    command = [sys.executable, str(ROOT / "benchmarks" / "stores.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 2
    assert "nothing" in done.stderr
    done = subprocess.run([*command, "--stores", name], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["size"] for row in rows] == ["256 KiB", "1 MiB", "4 MiB"]
    assert all(row[way] > 0 for row in rows for way in ("memcpy", "put", "get"))
