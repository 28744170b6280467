"""The kinds of store there are, by the names that ``--hicache-storage-backend`` takes: one row for each.

Nothing of a store is imported before it is chosen, so what it needs may be missing where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from rootcellar.errors import ConfigError
from rootcellar.tiers.guard import Guard, GuardSettings
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.store import Store

Opener = Callable[[Mapping[str, object], str], Store]
"""Opens a store, given its own settings and the identity of whoever writes; ``ConfigError``: it cannot be."""


def _of(module: str) -> Opener:
    """The function ``open_store`` of a module of this package, imported when it is called."""

    def opens(extra: Mapping[str, object], identity: str) -> Store:
        store: Store = import_module(f"{__package__}.{module}").open_store(extra, identity)
        return store

    return opens


BACKENDS: dict[str, Opener] = {
    "file": _of("file"),
    "chain": _of("chain"),
    "dynamic": _of("dynamic"),
    "redis": _of("redis"),
    "s3": _of("s3"),
    "mooncake": _of("mooncake"),
    "lmcache": _of("lmcache"),
    "nixl": _of("nixl"),
    "hf3fs": _of("hf3fs"),
    "aibrix": _of("aibrix"),
}
"""What opens a store of each kind."""
RUN_CODE = frozenset({"dynamic", "aibrix"})
"""Those whose settings name what is run: whoever starts the server may choose them, and nobody over HTTP."""
TIMED = frozenset({"chain"})
"""Those that are told the deadline too: it is of the calls to all that is behind them, together."""


def open_bare(backend: str, extra: Mapping[str, object], identity: str) -> Store:
    """A store of a kind without a guard. Raises ``ConfigError``: no such kind, a wrong setting, or it cannot be."""
    if backend not in BACKENDS:
        raise ConfigError(f"hicache_storage_backend={backend!r} is not there: choose from {', '.join(BACKENDS)}")
    return BACKENDS[backend](extra, identity)


def open_store(backend: str, extra: Mapping[str, object], identity: str) -> Guard:
    """A store of a kind, guarded.

    Args:
        backend: its name in ``BACKENDS``.
        extra: its settings, and ``deadline``: seconds after which the guard gives up a call.
        identity: what the engine that writes calls its pages; see ``FileSettings``.

    Raises:
        ConfigError: no such kind, a wrong setting, or it cannot be opened.
    """
    own = dict(extra)
    settings = GuardSettings(deadline=positive(own, "deadline", GuardSettings().deadline))
    if backend in TIMED:
        own["deadline"] = settings.deadline
    return Guard(open_bare(backend, own, identity), settings, name=f"{backend} store")


def runs_code(backend: str, extra: Mapping[str, object]) -> bool:
    """Whether these settings name code to run, the store's own or that of one behind it."""
    members = extra.get("stores") if backend == "chain" else None
    inner = [one for one in members if isinstance(one, Mapping)] if isinstance(members, list) else []
    return backend in RUN_CODE or any(runs_code(str(one.get("backend")), one) for one in inner)
