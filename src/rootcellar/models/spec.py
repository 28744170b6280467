"""What a parameter is: its shape, what of it may be sharded, how it begins, and which tensors of a checkpoint it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Params = dict[str, Any]
Axis = Literal["embed", "heads", "kv_heads", "mlp", "vocab"] | None
Init = Literal["random", "ones", "zeros"]
Array = np.ndarray[Any, Any]
Packing = Callable[[Array], list[tuple[Array, tuple[int, ...]]]]
"""From a parameter to the checkpoint's tensors it holds: for each a view (never a copy) whose axes are in the
tensor's order, perhaps split further, and the tensor's own shape. See ``packing``."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. ``axes`` names what may be sharded; ``sources`` are the checkpoint's tensors it is packed from."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    init: Init
    packing: Packing
    sources: tuple[str, ...]


class Declare(Protocol):
    """Makes the ``ParamSpec`` of a named parameter of one layer, the sources taken from its family's name table."""

    def __call__(
        self, name: str, shape: tuple[int, ...], axes: tuple[Axis, ...], init: Init, packing: Packing = ...
    ) -> ParamSpec:
        """The spec of parameter ``name``."""
        ...
