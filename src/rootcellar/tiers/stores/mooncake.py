"""Mooncake's store: pages lie in memory that its clients lend, this process among them, and a master knows where.

Images go from the guard's memory, which is registered with Mooncake, and come there: copies that are summed up by the
way cost less than what Mooncake takes to send a seal apart. A page that is there is not put again: damaged ones stay
misses until the master evicts them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import host_and_port, need, nothing_else, take_choice, take_size, take_switch, take_text
from rootcellar.tiers.store import check_names
from rootcellar.tiers.stores.passage import Passage

_PIECE = 1 << 20
"""Bytes that TCP gets at a time, unless the environment says otherwise: by Mooncake's 64 KiB each seal is a piece."""
_NO_ROOM = -200
_OTHER_LENGTH, _GONE = -600, (-703, -704, -706)
"""What it answers for a page: the buffer is too small; it is not written yet, not there, or was taken away."""
_KNOWN = (
    "local_hostname, metadata_server, master_server_address, protocol, device_name, global_segment_size, "
    "local_buffer_size, replica_num, soft_pin_ttl, hard_pin, prefix, timeout"
)


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """Of a store on Mooncake. Names and meanings are Mooncake's."""

    local_hostname: str
    metadata_server: str
    master_server_address: str
    master: tuple[str, int]
    """Host and port of that."""
    protocol: str
    device_name: str
    global_segment_size: int
    """Bytes of this process that hold pages of whoever puts them, as long as it lives."""
    local_buffer_size: int
    replica_num: int
    soft_pin_ttl: float
    """Seconds for which the master evicts others first; 0: none."""
    hard_pin: bool
    """Never evict."""
    prefix: str
    timeout: float
    """Seconds to wait for the master at the start."""


def read_settings(extra: Mapping[str, object]) -> MooncakeSettings:
    """What ``--hicache-storage-backend-extra-config`` says of it. Raises ``ConfigError``."""
    own = dict(extra)
    address = take_text(own, "master_server_address", "127.0.0.1:50051")
    master = host_and_port(address)
    if master is None:
        raise ConfigError(f"master_server_address={address!r} is not allowed: write host:port of mooncake_master")
    settings = MooncakeSettings(
        local_hostname=take_text(own, "local_hostname", "127.0.0.1"),
        metadata_server=take_text(own, "metadata_server", "P2PHANDSHAKE"),
        master_server_address=address,
        master=master,
        protocol=take_choice(own, "protocol", ("tcp", "rdma"), "tcp"),
        device_name=str(own.pop("device_name", "")),
        global_segment_size=take_size(own, "global_segment_size", 1 << 30) or 0,
        local_buffer_size=take_size(own, "local_buffer_size", 16 << 20) or 0,
        replica_num=int(positive(own, "replica_num", 1, whole=True)),
        soft_pin_ttl=positive(own, "soft_pin_ttl", 0, zero=True),
        hard_pin=take_switch(own, "hard_pin"),
        prefix=take_text(own, "prefix", "rootcellar-"),
        timeout=positive(own, "timeout", 5.0),
    )
    nothing_else(own, "mooncake", _KNOWN)
    return settings


class MooncakeStore:
    """A :class:`~rootcellar.tiers.store.Store` on Mooncake."""

    verifies = False

    def __init__(self, settings: MooncakeSettings) -> None:
        """Raises ``ConfigError``: Mooncake is missing, or its master is not there."""
        self.settings = settings
        try:  # its client waits for a master for minutes
            socket.create_connection(settings.master, settings.timeout).close()
        except OSError as error:
            said = f"the mooncake store has no master at {settings.master_server_address}: {error}"
            raise ConfigError(f"{said}; start mooncake_master") from None
        os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")
        os.environ.setdefault("MC_TCP_SLICE_SIZE", str(_PIECE))
        module = need("mooncake.store", "rootcellar[mooncake]", "a mooncake store")
        self._store: Any = module.MooncakeDistributedStore()
        self._how: Any = module.ReplicateConfig()
        self._how.replica_num = settings.replica_num
        self._how.with_hard_pin = settings.hard_pin
        if settings.soft_pin_ttl:
            self._how.soft_pin_ttl_ms = int(settings.soft_pin_ttl * 1000)
        code = self._store.setup(
            settings.local_hostname,
            settings.metadata_server,
            settings.global_segment_size,
            settings.local_buffer_size,
            settings.protocol,
            settings.device_name,
            settings.master_server_address,
        )
        if code != 0:
            raise ConfigError(f"the mooncake store cannot be set up: Mooncake says {code}, and why in its log")
        self._passage = Passage()
        self._lock = threading.Lock()
        self._shown: list[tuple[int, int, memoryview]] = []
        """Where memory begins and ends that Mooncake knows; it must stay."""
        self._staging = threading.Lock()
        self._stage: memoryview | None = None

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)
        if not names:
            return []
        with self._passage:
            codes = self._store.batch_is_exist(self._keys(names))
        if any(code < 0 for code in codes):
            raise OSError(f"Mooncake answered {min(codes)} to the question what is there")
        return [code == 1 for code in codes]

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)
        views = [view.cast("B") for view in into]
        if not names:
            return []
        with self._passage, self._in_registered(views) as (places, addresses):
            sizes = [len(view) for view in views]
            codes = self._store.batch_get_into(self._keys(names), addresses, sizes)
            found = [code == size for code, size in zip(codes, sizes, strict=True)]
            for view, place, whole in zip(views, places, found, strict=True):
                if whole and place is not view:
                    view[:] = place
        wrong = [code for code in codes if code < 0 and code not in _GONE and code != _OTHER_LENGTH]
        if wrong and not any(found):
            raise OSError(f"Mooncake answered {wrong[0]} to a get")
        return found

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``; False where no client has room. Raises ``OSError``."""
        check_names(names, blocks)
        views = [block.cast("B") for block in blocks]
        if not names:
            return []
        with self._passage, self._in_registered(views) as (places, addresses):
            for view, place in zip(views, places, strict=True):
                if place is not view:
                    place[:] = view
            keys, sizes = self._keys(names), [len(view) for view in views]
            codes = self._store.batch_put_from(keys, addresses, sizes, self._how)
        wrong = [code for code in codes if code not in (0, _NO_ROOM)]
        if wrong:
            raise OSError(f"Mooncake answered {wrong[0]} to a put")
        return [code == 0 for code in codes]

    def clear(self) -> int:
        """See ``Store``: every object whose key begins with our prefix, leased or not. Raises ``OSError``."""
        with self._passage:
            count = int(self._store.remove_by_regex(f"^{re.escape(self.settings.prefix)}.*", True))
        if count < 0:
            raise OSError(f"Mooncake answered {count} to a clearing")
        return count

    def register(self, buffer: memoryview) -> None:
        """See ``Store``: Mooncake sends from this memory and receives there. Raises ``OSError``."""
        start = _address(buffer)
        with self._passage:
            code = self._store.register_buffer(start, buffer.nbytes)
        if code != 0:
            raise OSError(f"Mooncake answered {code} to a registration")
        with self._lock:
            self._shown.append((start, start + buffer.nbytes, buffer))

    def close(self) -> None:
        """See ``Store``; calls that are under way end first. What lies in this process is lost to all."""
        if self._passage.shut():
            self._store.close()

    def _keys(self, names: Sequence[bytes]) -> list[str]:
        return [self.settings.prefix + name.hex() for name in names]

    def _registered(self, views: Sequence[memoryview], addresses: Sequence[int]) -> bool:
        with self._lock:
            shown = [(start, end) for start, end, _ in self._shown]
        ends = [at + len(view) for at, view in zip(addresses, views, strict=True)]
        if any(a <= min(addresses) and max(ends) <= b for a, b in shown):  # mostly they lie in one
            return True
        return all(any(a <= at and end <= b for a, b in shown) for at, end in zip(addresses, ends, strict=True))

    @contextmanager
    def _in_registered(self, views: Sequence[memoryview]) -> Iterator[tuple[Sequence[memoryview], list[int]]]:
        """The views themselves where all lie in registered memory, else as many bytes of memory that is; addresses."""
        addresses = [_address(view) for view in views]
        if self._registered(views, addresses):
            yield views, addresses
            return
        with self._staging:
            total = sum(len(view) for view in views)
            if self._stage is None or len(self._stage) < total:
                larger = memoryview(mmap.mmap(-1, total))
                self.register(larger)
                self._stage = larger
            ends = np.cumsum([len(view) for view in views]).tolist()
            places = [self._stage[end - len(view) : end] for end, view in zip(ends, views, strict=True)]
            yield places, [_address(place) for place in places]


def open_store(extra: Mapping[str, object], _identity: str) -> MooncakeStore:
    """See ``registry``."""
    return MooncakeStore(read_settings(extra))


def _address(view: memoryview) -> int:
    if view.readonly or not view.contiguous or view.nbytes == 0:
        return int(np.frombuffer(view, np.uint8).ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))  # a fifth of the time of NumPy's
