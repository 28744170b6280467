"""Weights that come over a wire, in parts: nothing is computed with before all of a version are there."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import SingleDeviceSharding

from rootcellar.errors import EngineError, ModelError, RequestError
from rootcellar.models.repacking import check_tensors
from rootcellar.transfer.wires.arrays import ArraySource
from rootcellar.transfer.wires.tcp import WireError


@dataclass
class IncomingWeights:
    """What has come of the next version, and from whom more may be fetched.

    A trainer sends a checkpoint's tensors in as many calls as it likes (SGLang's *buckets*). Whatever ends its version
    before all are there begins anew: another version, or a name for the second time.

    Attributes:
        wanted: the shape of each tensor by its name.
        lock: held by whoever calls; two trainers at once would mix what they send.
    """

    wanted: Mapping[str, tuple[int, ...]]
    lock: threading.Lock = field(default_factory=threading.Lock)
    _version: str | None = None
    _found: dict[str, Array] = field(default_factory=dict)
    _groups: dict[str, ArraySource] = field(default_factory=dict)

    def open(self, group: str, host: str, port: int, timeout: float) -> None:
        """See ``Engine.init_weights_update_group``."""
        if group in self._groups:
            raise RequestError(f"there is a group {group!r} already: destroy_weights_update_group first")
        try:
            self._groups[group] = ArraySource(host, port, timeout)
        except WireError as error:  # an address that is wrong is the caller's
            raise RequestError(str(error)) from error
        self._found = {}

    def close(self, group: str) -> None:
        """See ``Engine.destroy_weights_update_group``."""
        if self._groups.pop(group, None) is None:
            raise RequestError(
                f"there is no group {group!r}: {', '.join(self._groups) or 'init_weights_update_group first'}"
            )
        self._found = {}

    def fetch(
        self, group: str, number: int, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]],
        timeout: float,
    ) -> dict[str, Array]:  # fmt: skip
        """The tensors that the trainer of ``group`` offers by ``number``, on the first device.

        ``ModelError`` for one that the model does not have, before anything is fetched; ``EngineError`` where they did
        not come; ``RequestError`` for a group that is not there.
        """
        if group not in self._groups:
            raise RequestError(f"there is no group {group!r}: init_weights_update_group first")
        if not len(names) == len(dtypes) == len(shapes):
            raise RequestError(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes: one each")
        place = SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(tuple(shape), _dtype(dtype), sharding=place)
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
        }
        if len(wanted) != len(names):
            raise RequestError("a name comes twice")
        check_tensors(self.wanted, wanted, some=True)
        try:
            arrays = self._groups[group].fetch(number, list(wanted.values()), timeout)
        except WireError as error:
            raise EngineError(str(error)) from error
        return dict(zip(wanted, arrays, strict=True))

    def add(self, tensors: Mapping[str, Any], version: str | None) -> dict[str, Array] | None:
        """All tensors, once these complete them; None: some are missing yet.

        ``ModelError`` for one that the model does not have; then these are not taken.
        """
        check_tensors(self.wanted, tensors, some=True)
        if version != self._version or self._found.keys() & tensors.keys():
            self._found = {}
        self._version = version
        self._found |= {name: _on_device(tensor) for name, tensor in tensors.items()}
        if self.missing:
            return None
        found, self._found = self._found, {}
        return found

    @property
    def missing(self) -> int:
        """How many tensors are not there yet."""
        return len(self.wanted.keys() - self._found.keys())


def _on_device(tensor: Any) -> Array:
    """``tensor`` where it is, or on the first device: not while the engine waits for it."""
    array: Array = tensor if isinstance(tensor, Array) else jax.device_put(tensor, jax.devices()[0])
    return array


def _dtype(name: str) -> Any:
    """That which a trainer calls so, ``torch.bfloat16`` too."""
    try:
        return jnp.dtype(name.removeprefix("torch."))
    except TypeError as error:
        raise ModelError(f"dtype {name!r} is unknown") from error
