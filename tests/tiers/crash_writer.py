"""A process that writes into a file store until it is killed, and says which pages were confirmed.

    python crash_writer.py FOLDER FIRST_PAGE MAX_SIZE SEED

Each line is written when a ``put`` has returned: ``first count``. Pages of one put have one size, which follows from
the first one's number.
"""

import itertools
import os
import random
import sys
import threading
from pathlib import Path

from stores import file_store, get, put

SIZES = (5000, 40_000, 600_000)


def size_of(page: int) -> int:
    return SIZES[page // 10 % len(SIZES)]


def main() -> None:
    folder, first, max_size, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    store = file_store(folder, max_size=max_size)
    rng = random.Random(seed)
    confirmed = [first]

    def read() -> None:
        other = random.Random(seed)
        while True:
            page = other.randrange(confirmed[-1] + 1)
            get(store, page, size_of(page))

    threading.Thread(target=read, daemon=True).start()
    for start in itertools.count(first, 10):
        count = rng.randint(1, 8)
        done = put(store, range(start, start + count), size_of(start))
        assert all(done)
        confirmed.append(start)
        os.write(1, b"%d %d\n" % (start, count))


if __name__ == "__main__":
    main()
