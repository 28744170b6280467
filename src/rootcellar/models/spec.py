"""What a parameter is: its shape, what of it may be sharded, how it begins, and which tensors of a checkpoint it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Params = dict[str, Any]
Axis = Literal["embed", "heads", "kv_heads", "mlp", "vocab"] | None
Init = Literal["random", "ones", "zeros"]
Packing = Callable[[NDArray[Any]], list[tuple[NDArray[Any], tuple[int, ...]]]]
"""From a parameter to the checkpoint's tensors it holds: for each a view (never a copy) whose axes are in the
tensor's order, perhaps split further, and the tensor's own shape. See ``packing``."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. ``axes`` names what may be sharded; ``sources`` are the checkpoint's tensors it comes from.

    ``wide``: it stays float32 whatever the dtype of the weights, because its last bits decide. ``inputs``: the axes,
    the first or the last, that ``ops.products.product`` sums over; none: nothing is multiplied by it there.
    ``in_order``: parts of it are taken by its first axes, so it is best laid in their order (see ``places``).
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    init: Init
    packing: Packing
    sources: tuple[str, ...]
    wide: bool = False
    inputs: tuple[int, ...] = ()
    in_order: bool = False

    def dtype(self, weights: Any) -> np.dtype[Any]:
        """Its dtype, where that of the weights is ``weights``."""
        return np.dtype(np.float32 if self.wide else weights)


Hold = Callable[[tuple[Any, ...], NDArray[Any]], Any]
"""Puts a parameter on the device: its path in the params pytree, and its values in host memory."""


class Declare(Protocol):
    """Makes the ``ParamSpec`` of a named parameter of one layer, the sources taken from its family's name table."""

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[Axis, ...],
        init: Init,
        packing: Packing = ...,
        inputs: tuple[int, ...] = (),
    ) -> ParamSpec:
        """The spec of parameter ``name``."""
        ...
