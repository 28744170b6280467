"""The settings of the file store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rootcellar.errors import ConfigError
from rootcellar.units import parse_bytes

_LONGEST_IDENTITY = 1000


@dataclass(frozen=True, slots=True)
class FileSettings:
    """Of a file store."""

    path: Path
    max_size: int | None = None
    """Bytes that its files take at most, also those of other identities; None: what ``min_free_space`` leaves."""
    min_free_space: int = 1 << 30
    """Bytes of the file system that are left to others. Where they are not, files go."""
    identity: str = ""
    """Of the engine whose pages these are. It groups pages, it is no part of their names."""
    direct: bool = False
    """Go past the system's cache (``O_DIRECT``): for disks that are faster than copying, and memory that is short."""
    fsync: bool = False
    """Confirm a page when it is on the medium: it survives a power cut too."""
    read_only: bool = False
    """Never write: ``put`` has no room, and several processes may."""

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that cannot be."""
        if self.max_size is not None and self.max_size < 1 << 20:
            raise ConfigError(f"max_size={self.max_size} is not allowed: a file store takes at least 1 MiB")
        if self.min_free_space < 0:
            raise ConfigError(f"min_free_space={self.min_free_space} is not allowed: give 0 or more bytes")
        if len(self.identity) > _LONGEST_IDENTITY:
            raise ConfigError(
                f"an identity of {len(self.identity)} characters: at most {_LONGEST_IDENTITY} are allowed"
            )


def read_settings(extra: Mapping[str, object], identity: str = "") -> FileSettings:
    """What ``--hicache-storage-backend-extra-config`` says of a file store; sizes are bytes or like ``"100GB"``.

    Raises ``ConfigError``: an unknown name, a wrong value, or no ``path``.
    """
    switches = ("direct", "fsync", "read_only")
    sizes = ("max_size", "min_free_space")
    unknown = sorted(extra.keys() - {"path", *sizes, *switches})
    if unknown:
        known = ", ".join(("path", *sizes, *switches))
        raise ConfigError(f"a file store has no setting {', '.join(unknown)}; it has {known}")
    path = extra.get("path")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"path={path!r} is not allowed: name the folder of the file store")
    for name in switches:
        if not isinstance(extra.get(name, False), bool):
            raise ConfigError(f"{name}={extra[name]!r} is not allowed: it must be true or false")
    read = {name: _size(name, extra[name]) for name in sizes if extra.get(name) is not None}
    return FileSettings(
        Path(path).expanduser(),
        max_size=read.get("max_size"),
        min_free_space=read.get("min_free_space", 1 << 30),
        identity=identity,
        direct=extra.get("direct") is True,
        fsync=extra.get("fsync") is True,
        read_only=extra.get("read_only") is True,
    )


def _size(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return parse_bytes(str(value), name)
