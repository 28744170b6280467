"""Seeded fuzz runs: ``python tests/cache/fuzz.py STEPS [SEED [replay | lockstep]]``.

A failure names the seed and the world that repeat it. ``replay`` prints a hash of all states instead. ``lockstep`` asks
the Python and the native core the same and compares all they show after each step, in as many processes as there are
cores.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from typing import Any

from world import World

from rootcellar.cache.radix import PyRadixCache

STEPS_PER_WORLD = 200
WORLDS_PER_TASK = 50


def world_of(seed: int, number: int, make: Callable[..., Any] = PyRadixCache, search: bool = True) -> World:
    rng = random.Random(f"{seed}/{number}")
    return World(lambda n: int(rng.random() * n), make, search)


def play(seed: int, number: int, make: Callable[..., Any] = PyRadixCache, search: bool = True) -> None:
    """One world from its beginning to its end."""
    world = world_of(seed, number, make, search)
    try:
        for _ in range(STEPS_PER_WORLD):
            world.step()
    except Exception as error:
        raise AssertionError(f"seed {seed}, world {number}, {world.cache.kinds}, page {world.page}") from error


def run(steps: int, seed: int) -> int:
    """Worlds of 200 steps each until ``steps`` are done; the number of worlds."""
    worlds = -(-steps // STEPS_PER_WORLD)
    for number in range(worlds):
        play(seed, number)
        if (number + 1) % 1000 == 0:
            print(f"seed {seed}: {number + 1} worlds", file=sys.stderr, flush=True)
    return worlds


def lockstep(seed: int, first: int, worlds: int) -> int:
    """Worlds ``first`` on of a seed, on both cores."""
    from twins import Twins  # the native core may not be built

    for number in range(first, first + worlds):
        play(seed, number, Twins, search=False)
    return worlds


def lockstep_everywhere(steps: int, seed: int) -> int:
    """Worlds until ``steps`` are done, on all processors; the number of worlds."""
    began, done, worlds = time.monotonic(), 0, -(-steps // STEPS_PER_WORLD)
    starts = range(0, worlds, WORLDS_PER_TASK)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        counts = [min(WORLDS_PER_TASK, worlds - start) for start in starts]
        for count in pool.map(lockstep, [seed] * len(starts), starts, counts):
            done += count
            if done % 1000 < WORLDS_PER_TASK:
                seconds = time.monotonic() - began
                print(f"seed {seed}: {done * STEPS_PER_WORLD} steps in {seconds:.0f} s", file=sys.stderr, flush=True)
    return done


def replayed(worlds: int, seed: int) -> str:
    """A hash of every state that the worlds of a seed go through: the same in every process."""
    states = sha256()
    for number in range(worlds):
        world = world_of(seed, number)
        for _ in range(STEPS_PER_WORLD):
            world.step()
            states.update(world.state().encode())
    return states.hexdigest()


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    if sys.argv[3:] == ["replay"]:
        print(replayed(count // STEPS_PER_WORLD, first))
    elif sys.argv[3:] == ["lockstep"]:
        print(f"{lockstep_everywhere(count, first)} worlds in lockstep, {count} steps, seed {first}: no difference")
    else:
        print(f"{run(count, first)} worlds, {count} steps, seed {first}: every check held")
