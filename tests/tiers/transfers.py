"""The file store's transfers, C++ beside Python: of lengths around those of stripes, blocks and pieces.

    python tests/tiers/transfers.py FOLDER

``make sanitize`` runs it so, with nothing of rootcellar but ``slotio`` and what it stands on.
"""

import os
import random
import sys
from itertools import product
from pathlib import Path

import xxhash

from rootcellar.tiers.stores import slotio

VECTORS = ("", "plain")
AROUND = (1024, 4096, 12_288, slotio.READ_PIECE, slotio.WRITE_PIECE)
SHARED = (3 << 19) + 7
"""Of which three are summed up by two threads."""
SIZES = (240, 241, 255, *(n + d for n in AROUND for d in (-65, -64, -1, 0, 1)))


def compare(folder: Path, direct: bool, vectors: str) -> None:
    """One reads what the other wrote, a file that ends early too. Memory begins anywhere, and ends where it is used."""
    slow = slotio.UnbufferedByPython() if direct else slotio.BufferedByPython()
    fast = slotio.Native(slow, direct, vectors)
    fd = os.open(folder / "slots", os.O_RDWR | os.O_CREAT | slow.flags)
    dice = random.Random(1)
    for turn, size in enumerate(SIZES):
        count = 1 + turn % 3
        stride = slotio.round_up(size)
        given = [memoryview(dice.randbytes(size + turn % 40))[turn % 40 :] for _ in range(count)]
        seeds = [dice.getrandbits(64) for _ in range(count)]
        for writes, reads in ((fast, slow), (slow, fast)):
            os.ftruncate(fd, 0)
            into = [memoryview(bytearray(size + turn % 33))[turn % 33 :] for _ in given]
            sums = writes.write(fd, 8192, stride, slotio.Run(0, given, seeds, range(count)))
            assert os.fstat(fd).st_size == 8192 + count * stride
            run = slotio.Run(0, into, seeds, range(count))
            assert (reads.read(fd, 8192, stride, run), into) == (sums, given)
            for left in (0, 1, stride - 4096):
                os.ftruncate(fd, 8192 + (count - 1) * stride + left)
                if left < size:
                    assert [*reads.read(fd, 8192, stride, run)] == [*sums[:-1], None]
    os.close(fd)


def compare_sums(vectors: str) -> None:
    """Of images anywhere in memory, as they lie and as they are copied, beside xxhash."""
    dice = random.Random(2)
    for size in (*SIZES[1:], SHARED):
        given = [memoryview(dice.randbytes(size + start))[start:] for start in (0, 16, 5)]
        seeds = [dice.getrandbits(64) for _ in given]
        expected = [*map(xxhash.xxh3_64_intdigest, given, seeds)]
        into = [memoryview(bytearray(size + start))[start:] for start in (16, 3, 0)]
        assert slotio._slots.sums(given, seeds, [], vectors) == expected
        assert slotio._slots.sums(given, seeds, into, vectors) == expected
        assert into == given


if __name__ == "__main__":
    assert slotio.NATIVE, "there are no transfers in C++"
    for direct, vectors in product((False, True), VECTORS):
        compare(Path(sys.argv[1]), direct, vectors)
        compare_sums(vectors)
