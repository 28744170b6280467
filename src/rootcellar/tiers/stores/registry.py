"""The kinds of store there are, by the names that ``--hicache-storage-backend`` takes: one row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rootcellar.errors import ConfigError
from rootcellar.tiers.guard import Guard, GuardSettings
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.store import Store
from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import read_settings

BACKENDS: dict[str, Callable[[Mapping[str, object], str], Store]] = {
    "file": lambda extra, identity: FileStore(read_settings(extra, identity)),
}
"""What opens a store of each kind, given its own settings and the identity of whoever writes."""


def open_store(backend: str, extra: Mapping[str, object], identity: str) -> Guard:
    """A store of a kind, guarded.

    Args:
        backend: its name in ``BACKENDS``.
        extra: its settings, and ``deadline``: seconds after which the guard gives up a call.
        identity: what the engine that writes calls its pages; see ``FileSettings``.

    Raises:
        ConfigError: no such kind, a wrong setting, or it cannot be opened.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"hicache_storage_backend={backend!r} is not there: choose from {', '.join(BACKENDS)}")
    own = dict(extra)
    settings = GuardSettings(deadline=positive(own, "deadline", GuardSettings().deadline))
    return Guard(BACKENDS[backend](own, identity), settings, name=f"{backend} store")
