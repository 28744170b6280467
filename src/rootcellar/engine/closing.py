"""The end of an engine: closed by its owner, no longer referred to, or open when the program ends.

The engine's thread must stop before the interpreter is taken apart: what it refers to would never be freed, and the
binding library of the cache's core would report every bit of it.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Callable

from rootcellar.engine.build import Parts
from rootcellar.engine.loop import Loop

_open: dict[int, Callable[[], None]] = {}


def close_at_the_end(owner: object, loop: Loop, parts: Parts) -> Callable[[], None]:
    """A function that closes ``loop`` and ``parts``; it is called as well when ``owner`` or the program ends."""
    close = functools.partial(_close, loop, parts)
    _open[id(loop)] = close
    # At exit finalizers have a turn of their own, after which they do nothing; it may be too early or too late.
    weakref.finalize(owner, close).atexit = False
    return close


def _close(loop: Loop, parts: Parts) -> None:
    _open.pop(id(loop), None)
    if parts.grammars is not None:
        parts.grammars.close()
    loop.stop()
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
