"""A seeded fuzz run: ``python tests/cache/fuzz.py STEPS [SEED [replay]]``.

A failure names the seed and the world that repeat it. ``replay`` prints a hash of all states instead.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from world import World

from rootcellar.cache.radix import PyRadixCache

STEPS_PER_WORLD = 200


def world_of(seed: int, number: int, make: Callable[..., Any] = PyRadixCache) -> World:
    rng = random.Random(f"{seed}/{number}")
    return World(lambda n: int(rng.random() * n), make)


def run(steps: int, seed: int, make: Callable[..., Any] = PyRadixCache) -> int:
    """Worlds of 200 steps each until ``steps`` are done; the number of worlds."""
    done = worlds = 0
    while done < steps:
        world = world_of(seed, worlds, make)
        try:
            for _ in range(STEPS_PER_WORLD):
                world.step()
        except Exception as error:
            raise AssertionError(f"seed {seed}, world {worlds}, {world.cache.kinds}, page {world.page}") from error
        done += STEPS_PER_WORLD
        worlds += 1
        if worlds % 1000 == 0:
            print(f"seed {seed}: {done} steps in {worlds} worlds", file=sys.stderr, flush=True)
    return worlds


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
    else:
        print(f"{run(count, first)} worlds, {count} steps, seed {first}: every check held")
