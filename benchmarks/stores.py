"""Stores on other people's components: GB/s of puts and gets, beside memcpy and the component's own client.

    make test-stores ARGS=--collect-only                                      # once: what can be installed
    .venv-stores/client/bin/python benchmarks/stores.py [--stores redis,s3] [--rounds 5] [--json]
    .venv-stores/nixl/bin/python benchmarks/stores.py --stores nixl-posix

Each component is started as the tests start it, and asked for batches of images of each size through the store as an
engine uses it (with its checksums), through the component's own client, and by memcpy, in turns; medians are told.
"""

import argparse
import functools
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "store_components"))

from components import COMPONENTS, Missing, s3_client

from rootcellar.tiers.stores.registry import open_store

SIZES = {"256 KiB": 256 << 10, "1 MiB": 1 << 20, "4 MiB": 4 << 20}


def redis_client(settings, _folder):
    try:
        import redis
    except ImportError:  # our own needs none
        return None

    client = redis.Redis(unix_socket_path=settings["url"].removeprefix("unix://"))

    def put(keys, rows):
        pipe = client.pipeline(transaction=False)
        for key, row in zip(keys, rows, strict=True):
            pipe.set(key, row.tobytes())
        pipe.execute()

    def get(keys, rows):
        for row, found in zip(rows, client.mget(keys), strict=True):
            row[:] = np.frombuffer(found, np.uint8)

    return put, get


def botocore_client(settings, _folder):
    client = s3_client(settings)

    def put(keys, rows):
        for key, row in zip(keys, rows, strict=True):
            client.put_object(Bucket=settings["bucket"], Key=key, Body=row.tobytes())

    def get(keys, rows):
        for key, row in zip(keys, rows, strict=True):
            row[:] = np.frombuffer(client.get_object(Bucket=settings["bucket"], Key=key)["Body"].read(), np.uint8)

    return put, get


def mooncake_client(settings, _folder):
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", settings["master_server_address"]) == 0
    known = []

    def addresses(rows):
        base = rows.ctypes.data
        if base not in known:
            client.register_buffer(base, rows.nbytes)
            known.append(base)
        return [base + i * rows.shape[1] for i in range(len(rows))], [rows.shape[1]] * len(rows)

    def put(keys, rows):
        assert not any(client.batch_put_from(keys, *addresses(rows)))

    def get(keys, rows):
        assert all(code > 0 for code in client.batch_get_into(keys, *addresses(rows)))

    return put, get


def beside(path):
    """A folder for the files of a raw client, where the store has its."""
    folder = Path(f"{path}-raw")
    folder.mkdir()
    return folder


def nixl_moves(plugin, options, kind, pause):
    """One transfer of a batch by NIXL's API, as its examples use it: ``move(verb, rows, there)``.

    ``kind``: of what is ``there``. ``pause``: seconds between two looks; none where the caller's thread does the work.
    """
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent("raw", nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend(plugin, options)

    def move(verb, rows, there):
        base, size = rows.ctypes.data, rows.shape[1]
        here = [(base + i * size, size, 0, "") for i in range(len(there))]
        held = agent.register_memory(here, "DRAM"), agent.register_memory(there, kind)
        ours = agent.get_xfer_descs([each[:3] for each in here], "DRAM")
        theirs = agent.get_xfer_descs([each[:3] for each in there], kind)
        handle = agent.initialize_xfer(verb, ours, theirs, "raw")
        state = agent.transfer(handle)
        while state == "PROC":
            if pause:
                time.sleep(pause)
            state = agent.check_xfer_state(handle)
        assert state == "DONE"
        agent.release_xfer_handle(handle)
        for each in held:
            agent.deregister_memory(each)

    return move


def nixl_client(settings, _folder):
    """All files of a batch in one transfer, written under other names so that nobody finds a part of one."""
    moves = nixl_moves("POSIX", {}, "FILE", 0)
    folder = beside(settings["path"])

    def move(verb, keys, rows, flags):
        fds = [os.open(f"{folder}/{key}", flags, 0o600) for key in keys]
        moves(verb, rows, [(0, rows.shape[1], fd, "") for fd in fds])
        for fd in fds:
            os.close(fd)

    def put(keys, rows):
        parts = [f"{key}.part" for key in keys]
        move("WRITE", parts, rows, os.O_RDWR | os.O_CREAT)
        for part, key in zip(parts, keys, strict=True):
            os.replace(f"{folder}/{part}", f"{folder}/{key}")

    def get(keys, rows):
        move("READ", keys, rows, os.O_RDONLY)

    return put, get


def nixl_objects(settings, _folder):
    """An object each in one transfer."""
    from rootcellar.tiers.stores.nixl_objects import read_settings

    options = read_settings({k: v for k, v in settings.items() if k != "plugin"}).plugin
    moves, numbers = nixl_moves("OBJ", options, "OBJ", 1e-4), itertools.count(1)

    def move(verb, keys, rows):
        moves(verb, rows, [(0, rows.shape[1], next(numbers), key) for key in keys])

    return functools.partial(move, "WRITE"), functools.partial(move, "READ")


def lmcache_client(settings, _folder):
    """What LMCache's ``LMCServerConnector`` sends and reads, a page after the other; its module needs torch here."""
    from rootcellar.tiers.stores import lmcache

    with closing(lmcache.open_store({**settings, "namespace": "raw"}, "")) as store:
        ask, address = store._ask, store.settings.address
    server = socket.create_connection((address.host, address.port))

    def answer():
        said = server.recv(lmcache._ANSWER.size, socket.MSG_WAITALL)
        assert lmcache._ANSWER.unpack(said)[0] == lmcache._FINE

    def put(keys, rows):
        for key, row in zip(keys, rows, strict=True):
            server.sendall(ask(lmcache._PUT, _name(key), row.nbytes))
            server.sendall(row)
        server.sendall(ask(lmcache._EXIST, _name(keys[-1])))  # its puts have no answer: here all have come
        answer()

    def get(keys, rows):
        for key, row in zip(keys, rows, strict=True):
            server.sendall(ask(lmcache._GET, _name(key)))
            answer()
            view, done = memoryview(row), 0
            while done < len(view):
                done += server.recv_into(view[done:])

    return put, get


def _name(key):
    return bytes.fromhex(key[-64:])


AIBRIX = """
import asyncio, os, sys
from concurrent.futures import ThreadPoolExecutor
os.environ["AIBRIX_KV_CACHE_OL_SHFS_ROOT"] = sys.argv[1]
import torch
from aibrix_kvcache.l2.connectors import Connector, ConnectorConfig
from aibrix_kvcache.memory import ExternalMemoryRegion
connector = Connector.create(ConnectorConfig("SHFS", "raw", "pages", ThreadPoolExecutor(4)))
assert connector.open().is_ok()
loop, blocks = asyncio.new_event_loop(), {}
for line in sys.stdin:
    verb, size, *keys = line.split()
    for i in range(len(keys)):
        block = blocks.setdefault((size, i), torch.frombuffer(bytearray(os.urandom(int(size))), dtype=torch.uint8))
        call = getattr(connector, verb)(bytes.fromhex(keys[i]), ExternalMemoryRegion(block, 0, int(size)))
        assert loop.run_until_complete(call).is_ok()
    print("done", file=sys.__stdout__, flush=True)
"""
"""AIBrix's connector by itself, in a process of its environment, which is where its users have it."""


def aibrix_client(settings, folder):
    command = [settings["python"], "-I", "-c", AIBRIX, str(folder / "raw")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def ask(verb, keys, rows):
        words = [verb, str(rows.shape[1]), *(key[-64:] for key in keys)]
        process.stdin.write(" ".join(words).encode() + b"\n")
        process.stdin.flush()
        while (line := process.stdout.readline()) != b"done\n":
            assert line, "AIBrix's connector ended"

    return (lambda keys, rows: ask("put", keys, rows)), (lambda keys, rows: ask("get", keys, rows))


def files(settings, _folder):
    """Plain reads and writes of a file each."""
    folder = beside(settings["file_path_prefix"])

    def put(keys, rows):
        for key, row in zip(keys, rows, strict=True):
            (folder / key).write_bytes(row)

    def get(keys, rows):
        for key, row in zip(keys, rows, strict=True):
            with open(folder / key, "rb", buffering=0) as file:
                file.readinto(row)

    return put, get


CLIENTS = {
    "redis": redis_client,
    "s3": botocore_client,
    "mooncake": mooncake_client,
    "nixl-posix": nixl_client,
    "nixl-obj": nixl_objects,
    "hf3fs": files,
    "lmcache": lmcache_client,
    "aibrix": aibrix_client,
}
"""What to compare with: the component's own client, or plain files where it has none."""
FILES = {"nixl-posix": ("path", ("", "-raw")), "hf3fs": ("file_path_prefix", ("-raw",))}
"""Where a store or its raw client leaves a file for each page: the setting that has it, and what is behind that."""


def which(text):
    """Names of components, by commas, for an option."""
    names = text.split(",")
    if unknown := set(names) - COMPONENTS.keys():
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}: choose from {', '.join(COMPONENTS)}")
    return names


def started(names):
    """Each of these: its name, the component, which runs until the next is asked for, and a folder; what is missing is
    said and passed over.
    """
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                component = COMPONENTS[name](Path(folder))
            except Missing as missing:
                print(f"{name}: {missing}", file=sys.stderr)
                continue
            try:
                yield name, component, Path(folder)
            finally:
                component.stop()


def timed(call, nbytes):
    began = time.perf_counter()
    call()
    return nbytes / (time.perf_counter() - began) / 1e9


def measure(name, component, folder, rounds, total):
    settings = component.settings()
    store = open_store(component.backend, {**settings, "deadline": 60}, "benchmark")
    raw = CLIENTS[name](settings, folder) if name in CLIENTS else None
    for label, size in SIZES.items():
        count = max(min(total // size, 128), 1)
        pages = np.random.default_rng(1).integers(0, 256, (count, size), np.uint8)
        into = np.zeros_like(pages)
        for rows in (pages, into):
            store.register(rows.reshape(-1).data)  # as an engine does with its host memory
        rates = []
        for i in range(rounds + 1):  # the first is not counted
            rates.append(turn(store, raw, settings.get("prefix", ""), pages, into, raw_first=bool(i % 2)))
            forget(name, settings)
            if component.deletes and name != "nixl-posix":
                store.clear()
        row = {way: statistics.median(r[way] for r in rates[1:]) for way in rates[0]}
        for way in ("put", "get") if raw is not None else ():
            row[f"{way} of raw"] = row[way] / row[f"raw {way}"]
        yield {"store": name, "size": label} | row
    store.close()


def forget(name, settings):
    """Nothing stays in files, which would be written to the disk. They themselves do: where many were deleted, ext4 is
    slow to make others, for minutes.
    """
    setting, places = FILES.get(name, ("", ()))
    for file in (file for place in places for file in Path(settings[setting] + place).rglob("*") if file.is_file()):
        os.truncate(file, 0)


def turn(store, raw, prefix, pages, into, *, raw_first):
    """GB/s of each way, by its name, of pages that nobody had before; the two go first in turns."""
    names = [os.urandom(32) for _ in pages]
    keys = [f"{prefix}raw{name.hex()}" for name in names]
    blocks, views = [row.data for row in pages], [row.data for row in into]
    rates = {"memcpy": timed(lambda: np.copyto(into, pages), pages.nbytes)}
    into[:] = 0
    ways = [("put", lambda: check(store.put(names, blocks))), ("get", lambda: check(store.get(names, views)))]
    if raw is not None:
        put, get = raw
        theirs = [("raw put", lambda: put(keys, pages)), ("raw get", lambda: get(keys, into))]
        ways = [each for pair in zip(theirs, ways, strict=True) for each in (pair if raw_first else pair[::-1])]
    for way, call in ways:
        rates[way] = timed(call, pages.nbytes)
        if way == "get":
            assert (into == pages).all()
    return rates


def check(held):
    assert all(held), f"{sum(held)} of {len(held)} pages"


def show(rows):
    print("| store | image | memcpy | put | own client | of it | get | own client | of it |\n|" + "---|" * 9)
    for row in rows:
        words = [row["store"], row["size"], f"{row['memcpy']:.2f}"]
        for way in ("put", "get"):
            own = row.get(f"raw {way}")
            words += [f"{row[way]:.2f}", *(("", "") if own is None else (f"{own:.2f}", f"{row[f'{way} of raw']:.2f}"))]
        print("| " + " | ".join(words) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stores", type=which, default=",".join(COMPONENTS), help="which, by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=32, help="of a batch, at most 128 images")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with closing(started(args.stores)) as components:
        for name, component, folder in components:
            rows += measure(name, component, folder, args.rounds, args.mib << 20)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
