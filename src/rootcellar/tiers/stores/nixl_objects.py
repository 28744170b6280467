"""NIXL's plugin ``OBJ``: an object a page in a bucket of any S3 server.

Each page is a transfer of its own: NIXL calls a transfer failed as soon as one part of it has, while it still works in
the memory of the others. It lists and deletes nothing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import nothing_else, take_optional, take_switch, take_text
from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.nixl_agent import Agent, as_os_error
from rootcellar.tiers.stores.passage import Passage

_KNOWN = (
    "plugin, bucket, endpoint_override, region, access_key, secret_key, session_token, ca_bundle, "
    "use_virtual_addressing, num_threads, prefix, timeout"
)
_AT_ONCE = 64
"""Pages that NIXL is given at once."""


@dataclass(frozen=True, slots=True)
class NixlObjectSettings:
    """Of a store on NIXL's objects."""

    plugin: Mapping[str, str] = field(repr=False)
    """What the plugin is given, with its own names; secrets are among it."""
    prefix: str = "rootcellar/"
    timeout: float = 5.0
    """Seconds that a transfer may take."""


def read_settings(extra: Mapping[str, object]) -> NixlObjectSettings:
    """What ``--hicache-storage-backend-extra-config`` says of it but ``plugin``. Raises ``ConfigError``."""
    own = dict(extra)
    plugin = {"bucket": take_text(own, "bucket"), "region": take_text(own, "region", "us-east-1")}
    endpoint = take_optional(own, "endpoint_override")
    if endpoint is not None:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError("endpoint_override is not allowed: write http://host:port or https://host")
        plugin |= {"endpoint_override": endpoint, "scheme": endpoint.partition(":")[0]}
    for name in ("access_key", "secret_key", "session_token", "ca_bundle"):
        if (value := take_optional(own, name, secret=name != "ca_bundle")) is not None:
            plugin[name] = value
    if ("access_key" in plugin) != ("secret_key" in plugin):
        raise ConfigError("access_key and secret_key go together: give both, or none")
    plugin["use_virtual_addressing"] = "true" if take_switch(own, "use_virtual_addressing") else "false"
    plugin["num_threads"] = str(int(positive(own, "num_threads", 8, whole=True)))
    # A page has its checksum in it.
    plugin |= {"req_checksum": "required", "resp_checksum": "required"}
    settings = NixlObjectSettings(
        plugin, take_text(own, "prefix", "rootcellar/"), timeout=positive(own, "timeout", 5.0)
    )
    nothing_else(own, "nixl", _KNOWN)
    return settings


class NixlObjectStore:
    """A :class:`~rootcellar.tiers.store.Store` on NIXL's plugin ``OBJ``."""

    verifies = False

    def __init__(self, settings: NixlObjectSettings) -> None:
        """Raises ``ConfigError``: NIXL or its plugin is missing, or the bucket is not there."""
        self.settings = settings
        # Whoever fails is asked again by the guard, and told to others as missing meanwhile.
        os.environ.setdefault("AWS_RETRY_MODE", "standard")
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
        if "access_key" in settings.plugin:  # else it looks for a machine's own, for seconds
            os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        self._reader, self._writer = (Agent("OBJ", settings.plugin, settings.timeout) for _ in range(2))
        self._numbers = itertools.count(1)
        self._passage = Passage()
        try:
            self.has([bytes(32)])
        except OSError as error:
            raise ConfigError(
                f"the nixl store's bucket {settings.plugin['bucket']!r} cannot be used: {error}"
            ) from None

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)
        if not names:
            return []
        with self._passage, self._reader.lock, as_os_error():
            return self._reader.holds("OBJ", self._objects(names, [0] * len(names)))

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)
        views = [view.cast("B") for view in into]
        for view in views:  # an object that is too short leaves the end as it was: never that of the page
            view[-8:] = os.urandom(len(view[-8:]))
        with self._passage:
            found = self._read(names, views)
            if not any(found) and (late := [i for i, there in enumerate(self.has(names)) if there]):
                # NIXL does not say why it read nothing: they may have come meanwhile.
                again = self._read([names[i] for i in late], [views[i] for i in late])
                if not any(again):
                    raise OSError("NIXL could read nothing of what is there")
                found = [i in late and again[late.index(i)] for i in range(len(names))]
        return found

    def _read(self, names: Sequence[bytes], views: Sequence[memoryview]) -> list[bool]:
        found: list[bool] = []
        for start in range(0, len(names), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            with self._reader.lock, as_os_error():
                objects = self._objects(names[some], [len(view) for view in views[some]])
                found += self._reader.move("READ", views[some], "OBJ", objects, apart=True)
        return found

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, blocks)
        views = [block.cast("B") for block in blocks]
        held: list[bool] = []
        with self._passage:
            for start in range(0, len(names), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                with self._writer.lock, as_os_error():
                    objects = self._objects(names[some], [len(view) for view in views[some]])
                    held += self._writer.move("WRITE", views[some], "OBJ", objects, apart=True)
        if not all(held):
            raise OSError(f"NIXL could not write {held.count(False)} of {len(held)} pages")
        return held

    def clear(self) -> int:
        """See ``Store``; ``OSError``: NIXL deletes nothing."""
        raise OSError("NIXL deletes no objects: empty the bucket with its own tools, or give another prefix")

    def register(self, _buffer: memoryview) -> None:
        """Registering costs this plugin nothing, so each transfer does it."""

    def close(self) -> None:
        """See ``Store``; calls that are under way end first."""
        self._passage.shut()

    def _objects(self, names: Sequence[bytes], sizes: Sequence[int]) -> list[tuple[int, int, int, str]]:
        """NIXL's descriptors; it tells objects apart by the number."""
        pairs = zip(names, sizes, strict=True)
        return [(0, size, next(self._numbers), self.settings.prefix + name.hex()) for name, size in pairs]
