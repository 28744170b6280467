"""A process that writes is killed: what it confirmed is there, and whatever is found is right."""

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from crash_writer import look
from stores import file_store

from rootcellar.tiers.stores.audit import damages

WRITER = Path(__file__).with_name("crash_writer.py")


def write_until_killed(folder: Path, first: int, max_size: int, seed: int) -> list[int]:
    """The pages that were confirmed."""
    rng = random.Random(seed)
    command = [sys.executable, str(WRITER), str(folder), str(first), str(max_size), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        lines = [writer.stdout.readline() for _ in range(2 * rng.randint(1, 20) + 1)]  # a put has begun
        # Not to wait for anything: the moment should be anywhere in it.
        threading.Event().wait(rng.random() * 0.002)
        writer.kill()
        rest, errors = writer.communicate(timeout=60)
    assert writer.returncode == -9, errors.decode()
    told = (b"".join(lines) + rest).splitlines(keepends=True)
    runs = [map(int, line.split()) for line in told if line.endswith(b"\n") and line != b"putting\n"]
    return [start + i for start, count in runs for i in range(count)]


def kill_and_look(folder: Path, rounds: int, max_size: int, seed: int) -> None:
    evicts = max_size < 100 << 20
    confirmed: list[int] = []
    for turn in range(rounds):
        print(f"seed {seed}, turn {turn}")
        new = write_until_killed(folder, turn * 10_000, max_size, seed * 1000 + turn)
        assert new
        confirmed += new
        assert [found for found in damages(folder) if not isinstance(found, int)] == []
        store = file_store(folder, max_size=max_size)
        there = {page: look(store, page) for page in confirmed}  # and right, or it raises
        assert there[new[-1]]
        if not evicts:
            assert all(there.values())
        assert store.usage().damaged == 0
        store.close()


@pytest.mark.parametrize("evicts", [False, True])
def test_a_writer_that_is_killed(tmp_path, evicts):
    kill_and_look(tmp_path / "store", 4, (8 if evicts else 500) << 20, seed=7 + evicts)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_a_writer_that_is_killed_two_hundred_times(tmp_path, seed):
    kill_and_look(tmp_path / "store", 20, (8 if seed % 2 else 2000) << 20, seed=100 + seed)
