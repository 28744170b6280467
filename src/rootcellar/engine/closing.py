"""The end of an engine: closed by its owner, no longer referred to, or open when the program ends.

The engine's thread must stop before the interpreter is taken apart: what it refers to would never be freed, and the
binding library of the cache's core would report every bit of it.
"""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from collections.abc import Callable

from rootcellar.engine.build import Parts
from rootcellar.engine.exchange import Exchange
from rootcellar.engine.loop import Loop

_PATIENCE = 2.0
"""Seconds for giving memory back after a failure."""

_open: dict[int, Callable[[], None]] = {}


def close_at_the_end(owner: object, loop: Loop, parts: Parts, exchange: Exchange | None) -> Callable[[], None]:
    """A function that closes ``loop`` and ``parts``, and leaves other ranks.

    It is called as well when ``owner`` or the program ends.
    """
    close = functools.partial(_close, loop, parts, exchange)
    _open[id(loop)] = close
    # At exit finalizers have a turn of their own, after which they do nothing; it may be too early or too late.
    weakref.finalize(owner, close).atexit = False
    return close


def _close(loop: Loop, parts: Parts, exchange: Exchange | None) -> None:
    _open.pop(id(loop), None)
    if parts.grammars is not None:
        parts.grammars.close()
    loop.stop()
    if parts.trace is not None:
        parts.trace.close()
    if exchange is not None:
        exchange.close(f"rank {exchange.rank} was shut down", in_order=True)
    if not loop.failed:
        _give_back(parts)
        return
    # What the devices were about with a rank that is lost may never end, and then their memory is not given back.
    giving = threading.Thread(target=_give_back, args=(parts,), name="rootcellar-closing", daemon=True)
    giving.start()
    giving.join(_PATIENCE)


def _give_back(parts: Parts) -> None:
    if parts.peers is not None:
        parts.peers.close()
    if parts.events is not None:
        parts.events.close()
    if parts.mover is not None and parts.host is not None:
        store = parts.mover.close()
        if store is not None:
            store.close()
        parts.host.images.clear()
    for pool in parts.runner.pools.values():
        pool.free()


# JAX was imported before this module, so what it does at exit comes after.
@atexit.register
def _close_all() -> None:
    for close in list(_open.values()):
        close()
