"""The process in which AIBrix's KV cache runs: ``python aibrix_sidecar.py SOCKET BACKEND FOLDER``, in its environment.

It knows nothing of rootcellar, whose packages are not there. Whoever connects to the Unix socket sends a verb (``h``,
``g``, ``p`` or ``c``), a number of pages, their names and lengths, and, to put, their bytes; a byte for each page comes
back, and the bytes of each that was found. It ends when its standard input does, with whoever started it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

_HEAD = struct.Struct("<cI")
_PAGE = struct.Struct("<32sQ")
_ENDING = 2.0
"""Seconds that a connector may take to open or close once nobody is there."""


def main(path: str, backend: str, folder: str) -> None:
    """Serve connections until standard input ends, wherever it is then."""
    over = threading.Event()
    threading.Thread(target=_follow, args=(over,), daemon=True).start()
    os.environ[f"AIBRIX_KV_CACHE_OL_{backend}_ROOT"] = folder  # read when the package is imported
    l2 = import_module("aibrix_kvcache.l2.connectors")
    connector = l2.Connector.create(l2.ConnectorConfig(backend, "rootcellar", "pages", ThreadPoolExecutor(4)))
    status = connector.open()
    if not status.is_ok():
        sys.exit(f"AIBrix's {backend} cannot be opened: {status}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen()
    threading.Thread(target=_accept, args=(listening, connector, folder), daemon=True).start()
    over.wait()
    connector.close()
    os._exit(0)  # threads that wait for connections end with it


def _follow(over: threading.Event) -> None:
    sys.stdin.buffer.read()
    over.set()
    time.sleep(_ENDING)
    os._exit(1)


def _accept(listening: socket.socket, connector: Any, folder: str) -> None:
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=_serve, args=(connection, connector, folder), daemon=True).start()


def _serve(connection: socket.socket, connector: Any, folder: str) -> None:
    with closing(asyncio.new_event_loop()) as loop, connection, connection.makefile("rb") as reading:
        while len(head := reading.read(_HEAD.size)) == _HEAD.size:
            verb, count = _HEAD.unpack(head)
            pages = [_PAGE.unpack(reading.read(_PAGE.size)) for _ in range(count)]
            if verb == b"p":
                blocks = [_exactly(reading, length) for _, length in pages]
                calls = [connector.put(name, _region(block)) for (name, _), block in zip(pages, blocks, strict=True)]
                connection.sendall(bytes(loop.run_until_complete(_call(call)) for call in calls))
            elif verb == b"h":
                calls = [connector.exists(name) for name, _ in pages]
                connection.sendall(bytes(loop.run_until_complete(_call(call)) for call in calls))
            elif verb == b"g":
                for name, length in pages:
                    block = bytearray(length)
                    found = loop.run_until_complete(_call(connector.get(name, _region(block))))
                    connection.sendall(bytes([found]))
                    if found == 1:
                        connection.sendall(block)
            elif verb == b"c":
                names = _all(connector, folder)
                gone = sum(loop.run_until_complete(_call(connector.delete(name))) == 1 for name in names)
                connection.sendall(struct.pack("<Q", gone))


async def _call(call: Any) -> int:
    """1: it is done; 0: there is no such page; 2: it failed."""
    status = await call
    return 1 if status.is_ok() else 0 if status.is_not_found() else 2


def _region(block: bytearray) -> Any:
    torch, memory = import_module("torch"), import_module("aibrix_kvcache.memory")
    return memory.ExternalMemoryRegion(torch.frombuffer(block, dtype=torch.uint8), 0, len(block))


def _all(connector: Any, folder: str) -> list[bytes]:
    """The names of all pages; a connector lists none itself."""
    if connector.name == "RocksDB":
        return list(connector.store.keys())
    files = (path.name for path in Path(folder).rglob("*") if path.is_file())
    return [bytes.fromhex(name) for name in files if len(name) == 64]


def _exactly(reading: Any, length: int) -> bytearray:
    block = bytearray(length)
    view, done = memoryview(block), 0
    while done < length:
        count = reading.readinto(view[done:])
        if not count:
            raise ConnectionError("the connection ended in the middle of a page")
        done += count
    return block


if __name__ == "__main__":
    main(*sys.argv[1:])
