"""The file store against what its medium gives: the same bytes in the same sizes, in one run.

    .venv/bin/python benchmarks/file_store.py [--path FOLDER] [--mib 128] [--rounds 5] [--ways buffered] [--json]

For each size of an image, buffered, buffered and on the medium (fdatasync), and direct (O_DIRECT): GB/s of `put` and
`get`, of plain pwrite and pread of one file that is there already, one call an image, and of memcpy. Medians of the
rounds, in which all take turns; `of write` and `of read` are medians of each round's own ratio, with --cpu of the
processor's time, which a busy machine changes little (and which says nothing of a medium that is waited for). `put`
overwrites the pages of the round before, as a full store does. Whatever is read has been written shortly before, so
buffered reads come from the system's cache. `dd` of the same bytes is shown beside.
"""

import argparse
import hashlib
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import FileSettings

KIB = 1024
SIZES = (36, 144, 512, 590, 1024, 2048)
BATCH = 32
"""Images of one call of the store."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", type=Path, help="Where to write (default: a temporary folder).")
    parser.add_argument("--mib", type=int, default=128, help="MiB of each pass.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["buffered", "fdatasync", "direct"])
    parser.add_argument("--kib", nargs="+", type=int, default=SIZES, help="Sizes of an image.")
    parser.add_argument("--cpu", action="store_true", help="Seconds of the processor instead of the clock's.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print(f"{'way':<10} {'KiB':>5} {'memcpy':>7} {'write':>7} {'dd':>7} {'put':>7} {'of write':>9} ", end="")
        print(f"{'read':>7} {'get':>7} {'of read':>8}   (GB/s)")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=args.path) as folder:
        for way in args.ways:
            for kib in args.kib:
                rows.append(r := measure(Path(folder), kib * KIB, way, args.mib << 20, args.rounds, args.cpu))
                if not args.json:
                    print(
                        f"{r['way']:<10} {r['kib']:>5} {r['memcpy']:>7.2f} {r['write']:>7.2f} {r['dd']:>7.2f} ", end=""
                    )
                    print(f"{r['put']:>7.2f} {r['of write']:>8.0%}  {r['read']:>7.2f} {r['get']:>7.2f} ", end="")
                    print(f"{r['of read']:>7.0%}", flush=True)
    if args.json:
        print(json.dumps(rows))


def measure(folder: Path, size: int, way: str, nbytes: int, rounds: int, cpu: bool) -> dict[str, object]:
    """GB/s, by the clock or of ``cpu`` time, of each way to move ``nbytes`` in images of ``size``."""
    count = nbytes // size
    clock = process_seconds if cpu else time.perf_counter
    memory = np.frombuffer(mmap.mmap(-1, count * size), np.uint8)
    memory[:] = np.frombuffer(np.random.default_rng(0).bytes(count * size), np.uint8)
    other = np.frombuffer(mmap.mmap(-1, count * size), np.uint8)
    other[:] = 0
    images = [memoryview(memory[i * size : (i + 1) * size]) for i in range(count)]
    into = [memoryview(other[i * size : (i + 1) * size]) for i in range(count)]

    path = folder / "store"
    settings = FileSettings(
        path, max_size=count * size + (4 << 20), min_free_space=0, direct=way == "direct", fsync=way == "fdatasync"
    )
    store = FileStore(settings)
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if way == "direct" else 0)
    plain = os.open(folder / "plain", flags, 0o600)
    os.posix_fallocate(plain, 0, count * size)
    source = Path("/dev/shm") if Path("/dev/shm").is_dir() else folder
    bytes_file = source / f"rootcellar-bench-{os.getpid()}"
    bytes_file.write_bytes(memory.tobytes())

    def write() -> None:
        for start in range(0, count, BATCH):
            for i in range(start, min(start + BATCH, count)):
                os.pwritev(plain, [images[i]], i * size)
            if way == "fdatasync":
                os.fdatasync(plain)

    def read() -> None:
        for i in range(count):
            os.preadv(plain, [into[i]], i * size)

    def put(turn: int) -> None:
        for start in range(0, count, BATCH):
            some = range(start, min(start + BATCH, count))
            store.put([_name(turn, i) for i in some], images[some.start : some.stop])

    def get(turn: int) -> None:
        for start in range(0, count, BATCH):
            some = range(start, min(start + BATCH, count))
            store.get([_name(turn, i) for i in some], into[some.start : some.stop])

    def dd() -> None:
        words = ["dd", f"if={bytes_file}", f"of={folder / 'dd'}", f"bs={size}", "status=none"]
        words.append("conv=notrunc,fdatasync" if way == "fdatasync" else "conv=notrunc")
        words += ["oflag=direct"] if way == "direct" else []
        subprocess.run(words, check=True)

    def memcpy() -> None:
        for view, image in zip(into, images, strict=True):
            view[:] = image

    seen: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):  # the first only makes the files
        calls: dict[str, Callable[[], None]] = {"memcpy": memcpy, "write": write, "dd": dd}
        calls |= {"put": lambda turn=turn: put(turn), "read": read, "get": lambda turn=turn: get(turn)}
        for name, call in calls.items():
            began = clock()
            call()
            if turn:
                seen[name].append(count * size / (clock() - began) / 1e9)
        assert all(store.has([_name(turn, i) for i in range(count)])), "the store is too small for this"
        assert (other == memory).all()
    store.close()
    os.close(plain)
    bytes_file.unlink()
    shutil.rmtree(path)
    for name in ("plain", "dd"):
        (folder / name).unlink()
    for ratio, (ours, plain) in {"of write": ("put", "write"), "of read": ("get", "read")}.items():
        seen[ratio] = [a / b for a, b in zip(seen[ours], seen[plain], strict=True)]
    return {"way": way, "kib": size // KIB, **{name: statistics.median(each) for name, each in seen.items()}}


def process_seconds() -> float:
    """The processor's time of this process and of those that it waited for."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


def _name(turn: int, i: int) -> bytes:
    return hashlib.sha256(b"%d/%d" % (turn, i)).digest()


if __name__ == "__main__":
    main()
