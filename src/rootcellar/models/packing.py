"""Between a checkpoint's tensors and our parameters: pure numpy, both ways.

A checkpoint stores a linear layer as ``[out, in]``; ours are ``[in, out]``, with what runs together stored together
(see ``params``). The dtype changes on the way, so no copy in the checkpoint's dtype is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from rootcellar.models.params import ParamSpec

Array = np.ndarray[Any, Any]

INPUT_AXES = {"same": 0, "transposed": 1, "qkv": 1, "qkv_bias": 0, "o": 2, "gate_up": 1, "gate_up_bias": 0}
"""How many leading axes of a parameter are the inputs, which a checkpoint stores last."""


def source_shapes(spec: ParamSpec) -> list[tuple[int, ...]]:
    """The shape of each tensor in ``spec.sources``, as the checkpoint stores it."""
    if spec.packing == "same":
        return [spec.shape]
    inputs = INPUT_AXES[spec.packing]
    views = (view.shape for view in _views(spec, np.broadcast_to(np.uint8(0), spec.shape)))
    return [(prod(s[: len(s) - inputs]), *([prod(s[-inputs:])] if inputs else [])) for s in views]


def pack(spec: ParamSpec, sources: Sequence[Callable[[], Array]], dtype: Any) -> Array:
    """One parameter in ``dtype``, from functions that read its sources; they are called one at a time."""
    packed = np.empty(spec.shape, dtype)
    for view, source in zip(_views(spec, packed), sources, strict=True):
        view[...] = source().reshape(view.shape)
    return packed


def unpack(spec: ParamSpec, packed: Array) -> list[Array]:
    """The checkpoint's tensors of one parameter, in its dtype: the inverse of ``pack``."""
    views = zip(_views(spec, packed), source_shapes(spec), strict=True)
    return [np.ascontiguousarray(view).reshape(shape) for view, shape in views]


def _views(spec: ParamSpec, packed: Array) -> list[Array]:
    """The parts of a parameter that belong to each of its sources, outputs first as there: views, not copies."""
    match spec.packing:
        case "gate_up" | "gate_up_bias":
            parts = [packed[..., 0, :], packed[..., 1, :]]
        case "qkv" | "qkv_bias":
            parts = [packed[..., :-2, :], packed[..., -2, :], packed[..., -1, :]]
        case _:
            parts = [packed]
    inputs = INPUT_AXES[spec.packing]
    return [part.transpose(*range(inputs, part.ndim), *range(inputs)) for part in parts]
