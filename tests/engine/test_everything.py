"""Everything at once, by seeds: ``everything.py`` in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("everything.py")


@pytest.mark.parametrize(("first", "last"), [(0, 3), pytest.param(3, 503, marks=pytest.mark.long)])
def test_whatever_is_drawn_answers_as_one_plain_engine(first, last):
    """Three configurations by day, five hundred at night. The seed of each, and what it was, is in the output."""
    command = [sys.executable, SCRIPT, str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
