"""Everything at once, by seeds: ``everything.py`` in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("everything.py")


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 503, 50))])
def test_whatever_is_drawn_answers_as_one_plain_engine(first):
    """Three configurations by day, fifty at a time at night. The seed of each, and what it was, is in the output."""
    last = str(first + (50 if first else 3))
    done = subprocess.run([sys.executable, SCRIPT, str(first), last], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
