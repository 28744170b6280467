"""The benchmark of stores runs on each component."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stores_are_measured_beside_memcpy(component, request):
    name = request.config.getoption("--component")

    def measured(stores):
        words = ["--stores", stores, "--rounds", "1", "--mib", "4", "--json"]
        command = [sys.executable, str(ROOT / "benchmarks" / "stores.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)

    done = measured(f"{name},nothing")
    assert done.returncode == 2
    assert "nothing" in done.stderr
    done = measured(name)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["size"] for row in rows] == ["256 KiB", "1 MiB", "4 MiB"]
    assert all(row[way] > 0 for row in rows for way in ("memcpy", "put", "get"))
