"""LMCache's server (``lmcache_server HOST PORT``, the protocol of ``lm://``): each page is one of its binary objects.

The protocol is its own, spoken here without any of its packages. A put has no answer, so several are followed by the
question whether the last page is there. The server deletes nothing and keeps all in its memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import hide, host_and_port, nothing_else, read_extra, take_text
from rootcellar.tiers.store import Block, GatheringStore, check_names
from rootcellar.tiers.stores.wire import Address, Wire, Wires

_ASK = struct.Struct("9i150s")
"""Command, bytes, format, dtype, where, four lengths of axes, key."""
_ANSWER = struct.Struct("9i")
"""Code, bytes, format, dtype, four lengths of axes, where."""
_PUT, _GET, _EXIST, _LIST, _HEALTH = range(1, 6)
_BINARY = 4
_FINE = 200
_AT_ONCE = 128
_KNOWN = "url, namespace, timeout, config_file"


@dataclass(frozen=True, slots=True)
class LMCacheSettings:
    """Of a store on LMCache's server."""

    address: Address
    namespace: str = "rootcellar"
    """Stands in our keys where LMCache has a model's name."""


def read_settings(extra: Mapping[str, object]) -> LMCacheSettings:
    """What ``--hicache-storage-backend-extra-config`` says of it. Raises ``ConfigError``.

    ``config_file`` is one of LMCache's own: its ``remote_url`` is taken where there is no ``url``.
    """
    own = dict(extra)
    if own.get("config_file") is not None:
        file = take_text(own, "config_file")
        theirs = read_extra(f"@{file}")
        if not isinstance(theirs.get("remote_url"), str):
            raise ConfigError(f"{file} has no remote_url: write remote_url: lm://host:port")
        own.setdefault("url", theirs["remote_url"])
    own.pop("config_file", None)
    url = take_text(own, "url", "lm://127.0.0.1:65432")
    at = host_and_port(url.removeprefix("lm://"))
    if not url.startswith("lm://") or at is None:
        raise ConfigError(f"url={hide(url)!r} is not allowed: write lm://host:port, where lmcache_server listens")
    namespace = take_text(own, "namespace", "rootcellar")
    if "@" in namespace or len(namespace.encode()) > 60 or not namespace.isprintable():
        raise ConfigError(f"namespace={namespace!r} is not allowed: at most 60 bytes, without @")
    settings = LMCacheSettings(Address(*at, timeout=positive(own, "timeout", 5.0)), namespace)
    nothing_else(own, "lmcache", _KNOWN)
    return settings


class LMCacheStore(GatheringStore):
    """A :class:`~rootcellar.tiers.store.Store` on LMCache's server."""

    verifies = False

    def __init__(self, settings: LMCacheSettings) -> None:
        """Raises ``ConfigError``: the server is not there."""
        self.settings = settings
        self._wires = Wires(settings.address)
        try:
            self._wires.run(_alive)
        except OSError as error:
            raise ConfigError(f"the lmcache store at {settings.address} cannot be used: {error}") from None

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)
        return self._wires.run(lambda wire: self._exist(wire, names))

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)

        def ask(wire: Wire) -> list[bool]:
            found: list[bool] = []
            for start in range(0, len(names), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                wire.send([self._ask(_GET, name) for name in names[some]])
                found += [_fill(wire, view) for view in into[some]]
            return found

        return self._wires.run(ask)

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        return self.put_parts(names, blocks, lambda _: b"")

    def gathers(self, _images: Sequence[memoryview]) -> bool:
        """See ``GatheringStore``: of any length, from any memory."""
        return True

    def put_parts(
        self, names: Sequence[bytes], images: Sequence[memoryview], tail: Callable[[int], Block]
    ) -> list[bool]:
        """See ``GatheringStore``. Raises ``OSError``."""
        check_names(names, images)

        def give(wire: Wire) -> list[bool]:
            for i in range(len(names)):
                end = tail(i)
                wire.send([self._ask(_PUT, names[i], images[i].nbytes + len(end)), images[i], end])
            # It does one command after the other and ends the connection where one fails: with the last all are there.
            return [True] * len(names) if all(self._exist(wire, names[-1:])) else self._exist(wire, names)

        return self._wires.run(give)

    def clear(self) -> int:
        """See ``Store``; ``OSError``: its protocol has no deleting."""
        raise OSError("LMCache's server deletes nothing: start it again, or give another namespace")

    def register(self, _buffer: memoryview) -> None:
        """Nothing comes of it."""

    def close(self) -> None:
        """See ``Store``."""
        self._wires.close()

    def _exist(self, wire: Wire, names: Sequence[bytes]) -> list[bool]:
        there: list[bool] = []
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            wire.send([self._ask(_EXIST, name) for name in some])
            for _ in some:
                there.append(_ANSWER.unpack(wire.exactly(_ANSWER.size))[0] == _FINE)
                wire.acknowledge()
        return there

    def _ask(self, command: int, name: bytes, nbytes: int = 0) -> bytes:
        key = f"{self.settings.namespace}@1@0@{name.hex()}@uint8".encode().ljust(150)
        return _ASK.pack(command, nbytes, _BINARY, 0, 0, nbytes, 0, 0, 0, key)


def open_store(extra: Mapping[str, object], _identity: str) -> LMCacheStore:
    """See ``registry``."""
    return LMCacheStore(read_settings(extra))


def _alive(wire: Wire) -> None:
    wire.send([_ASK.pack(_HEALTH, 0, _BINARY, 0, 0, 0, 0, 0, 0, b"rootcellar@1@0@0@uint8".ljust(150))])
    (code, *_) = _ANSWER.unpack(wire.exactly(_ANSWER.size))
    if code != _FINE:
        raise OSError(f"it answered with code {code}: is it LMCache's server?")


def _fill(wire: Wire, view: memoryview) -> bool:
    code, length, *_ = _ANSWER.unpack(wire.exactly(_ANSWER.size))
    if code != _FINE:
        return False
    if length == view.nbytes:
        wire.into(view.cast("B"))
        return True
    wire.skip(length)
    return False
