"""The settings of the file store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rootcellar.errors import ConfigError
from rootcellar.tiers.settings import nothing_else, take_size, take_switch

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
    own = dict(extra)
    path = own.pop("path", None)
    if not isinstance(path, str) or not path:
        raise ConfigError(f"path={path!r} is not allowed: name the folder of the file store")
    free = take_size(own, "min_free_space")
    settings = FileSettings(
        Path(path).expanduser(),
        max_size=take_size(own, "max_size"),
        min_free_space=1 << 30 if free is None else free,
        identity=identity,
        direct=take_switch(own, "direct"),
        fsync=take_switch(own, "fsync"),
        read_only=take_switch(own, "read_only"),
    )
    nothing_else(own, "file", "path, max_size, min_free_space, direct, fsync, read_only")
    return settings
