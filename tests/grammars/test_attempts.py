"""Grammars made to break whatever compiles them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("attempts.py")


def _attempt(count, seed):
    """In a process of its own, whose end is looked at: what dies here would have been the server."""
    command = [sys.executable, str(PROGRAM), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * count)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_random_grammars_never_end_the_process():
    said = _attempt(25, 10_000)
    assert sum(said.values()) == 25
    assert said["followed"] + said["ended"] > 5  # most of them mean something


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_two_thousand_random_grammars_never_end_the_process():
    assert sum(_attempt(2000, 0).values()) == 2000
