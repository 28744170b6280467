"""A store behind the host's memory: attached when the engine starts or later, taken away while requests run.

What is slow, opening a store and waiting for what it has under way, is done on the thread of whoever asks; the engine's
thread carries out the commands in between.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from rootcellar.engine.build import Parts
from rootcellar.engine.commands import Attach, Detach, Leave, Save
from rootcellar.engine.loop import Loop
from rootcellar.errors import ConfigError, EngineError
from rootcellar.scheduler import PREFETCH_POLICIES, PrefetchPolicy
from rootcellar.tiers.prefetching import PrefetchSettings
from rootcellar.tiers.settings import Extra, hide, read_extra
from rootcellar.tiers.store import Store
from rootcellar.tiers.stores import open_store

log = logging.getLogger(__name__)

DRAIN = 30.0
"""Seconds that detaching waits for what is under way."""


@dataclass(frozen=True)
class _Attached:
    """A store that is in use, and what it was asked for with."""

    store: Store
    backend: str
    extra: Mapping[str, Any]
    policy: PrefetchPolicy


class StorageBackend:
    """The store of one engine. Its methods may be called from any thread, and wait for each other."""

    def __init__(self, loop: Loop, parts: Parts) -> None:
        """That of the engine that ``loop`` runs; it has the one that the settings name, if any."""
        self._loop = loop
        self._parts = parts
        self._lock = threading.Lock()
        self._attached: _Attached | None = None
        config = parts.config
        if config.node_rank != 0:
            return  # it follows rank 0
        if config.enable_lmcache:
            file = config.lmcache_config_file
            self.attach("lmcache", {} if file is None else {"config_file": file})
        elif config.hicache_storage_backend is not None:
            self.attach(config.hicache_storage_backend, config.hicache_storage_backend_extra_config)

    def attach(
        self,
        backend: str,
        extra_config: Extra = None,
        *,
        prefetch_policy: str | None = None,
        replace: bool = False,
        timeout: float = DRAIN,
    ) -> dict[str, Any]:
        """Keep pages in a store from now on, and look for the prompts of new requests there. See ``Engine``."""
        config = self._parts.config
        if self._parts.mover is None:
            raise ConfigError("a store keeps what host memory holds: start the engine with enable_hierarchical_cache")
        policy = read_policy(prefetch_policy or config.hicache_storage_prefetch_policy)
        extra = read_extra(extra_config)
        prefetch, of_store = PrefetchSettings.split(extra)
        if config.nnodes > 1:
            of_store = _plain(of_store)
        with self._lock:
            if self._attached is not None and not replace:
                raise ConfigError(f"a store is attached already ({self._attached.backend}): detach or replace it")
            if self._attached is not None:
                self._detach(timeout)
            store = open_store(backend, of_store, self._parts.identity)
            try:
                self._loop.run(Attach(backend, policy, prefetch, of_store), store)
            except BaseException:
                store.close()
                raise
            self._attached = _Attached(store, backend, extra, policy)
            return self._status()

    def detach(self, timeout: float = DRAIN) -> bool:
        """Stop using the store, and let go of it; False when there was none. See ``Engine``."""
        with self._lock:
            if self._attached is None:
                return False
            self._detach(timeout)
            return True

    def status(self) -> dict[str, Any]:
        """What is attached, and with which settings."""
        with self._lock:
            return self._status()

    def clear(self) -> int | None:
        """Delete every page that the store holds, whoever put it there; how many, None where there is no store.

        What the cache knows of them it forgets when it misses them. Raises ``EngineError`` when the store fails.
        """
        with self._lock:
            if self._attached is None:
                return None
            try:
                return self._attached.store.clear()
            except (OSError, TimeoutError) as error:
                raise EngineError(f"the store could not be cleared: {error}") from error

    def end(self, *, save: bool) -> None:
        """The engine is about to end: let go of the store, and give it first what it lacks if ``save``."""
        with self._lock:
            if self._attached is None:
                return
            try:
                if save:
                    self._loop.run(Save())
                self._detach(DRAIN)
            except EngineError as error:  # it ends all the same
                log.warning("the store was left as it is: %s", error)

    def _status(self) -> dict[str, Any]:
        now = self._attached
        return {
            "hicache_storage_backend": None if now is None else now.backend,
            "hicache_storage_backend_extra_config": None if now is None else hide(now.extra),
            "hicache_storage_prefetch_policy": None if now is None else now.policy,
            "hicache_write_policy": self._parts.config.hicache_write_policy,
        }

    def _detach(self, timeout: float) -> None:
        mover = self._parts.mover
        assert mover is not None
        until = monotonic() + timeout
        mover.leave()  # here already: the engine's thread may be waiting for this store
        leaving = self._loop.post(Leave())
        left = mover.await_left(timeout)
        self._loop.wait(leaving)
        if left:
            raise EngineError(
                f"the store did not return from {left} pages within {timeout:g} s; nothing new is given to it, and it "
                "can be detached once it returns: try again"
            )
        store = None
        while store is None:
            self._loop.learn()
            store = self._loop.run(Detach())
            if store is None and monotonic() > until:
                raise EngineError(f"copies to and from the store did not end within {timeout:g} s: try again")
        self._attached = None
        store.close()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as ranks can tell them each other. ``ConfigError`` where one is no value of JSON."""
    told = {}
    for name, value in settings.items():
        try:
            told[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError, RecursionError):
            said = f"{name}, a {type(value).__name__}, is not allowed with nnodes"
            raise ConfigError(f"{said}: each rank is told the settings of a store, so give values of JSON") from None
    return told


def read_policy(policy: str) -> PrefetchPolicy:
    """``policy`` as one of those there are; ``ConfigError`` for any other."""
    for known in PREFETCH_POLICIES:
        if policy == known:
            return known
    raise ConfigError(
        f"hicache_storage_prefetch_policy={policy!r} is not allowed: choose from {', '.join(PREFETCH_POLICIES)}"
    )
