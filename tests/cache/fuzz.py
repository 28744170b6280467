"""A seeded fuzz run: ``python tests/cache/fuzz.py STEPS [SEED]``. Every failure prints the seed that repeats it."""

from __future__ import annotations

import random
import sys

from world import World

STEPS_PER_WORLD = 200


def run(steps: int, seed: int) -> int:
    """Worlds of 200 steps each until ``steps`` are done; the number of worlds."""
    done = worlds = 0
    while done < steps:
        rng = random.Random(f"{seed}/{worlds}")
        world = World(lambda n, rng=rng: int(rng.random() * n))
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


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    print(f"{run(count, first)} worlds, {count} steps, seed {first}: every check held")
