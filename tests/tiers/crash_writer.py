"""A process that writes into a file store until it is killed, and says which pages were confirmed.

    python crash_writer.py FOLDER FIRST_PAGE MAX_SIZE SEED

A line ``putting`` is written before each ``put``, and when it has returned ``first count``. Pages of one put have one
size, which follows from the first one's number.
"""

import itertools
import os
import random
import sys
import threading
from pathlib import Path

from stores import file_store, name

from rootcellar.tiers.store import NAME_BYTES
from rootcellar.tiers.stores.file import FileStore

SIZES = (5000, 600_000, 40_000, 600_000)


def size_of(page: int) -> int:
    return SIZES[page // 10 % len(SIZES)]


def content(page: int) -> memoryview:
    """Made quickly, so that most of the process's time goes into writing."""
    nbytes = size_of(page)
    return memoryview((name(page) * (nbytes // NAME_BYTES + 1))[:nbytes])


def look(store: FileStore, page: int) -> bool:
    """Whether a page is there; it is right then."""
    into = memoryview(bytearray(size_of(page)))
    (found,) = store.get([name(page)], [into])
    assert not found or into == content(page), f"wrong bytes for page {page}"
    return found


def main() -> None:
    folder, first, max_size, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    store = file_store(folder, max_size=max_size)
    rng = random.Random(seed)
    confirmed = [first]

    def read() -> None:
        other = random.Random(seed)
        while True:
            look(store, other.randrange(confirmed[-1] + 1))

    threading.Thread(target=read, daemon=True).start()
    for start in itertools.count(first, 10):
        count = rng.randint(1, 8)
        pages = range(start, start + count)
        names, images = [name(i) for i in pages], [content(i) for i in pages]
        os.write(1, b"putting\n")
        done = store.put(names, images)
        count = sum(done)
        assert done == [True] * count + [False] * (len(done) - count)  # the first ones get what room there is
        assert count
        confirmed.append(start)
        os.write(1, b"%d %d\n" % (start, count))


if __name__ == "__main__":
    main()
