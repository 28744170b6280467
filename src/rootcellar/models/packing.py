"""Between a checkpoint's tensors and our parameters: pure numpy, both ways.

A checkpoint stores a linear layer as ``[out, in]``; ours are ``[in, out]``, with what runs together stored together
(see ``params``). The dtype changes on the way, so no copy in the checkpoint's dtype is made.

A *packing* gives the views of a parameter that are the checkpoint's tensors: a new one is one small function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.models.spec import ParamSpec

_PART = 2**24  # elements of a tensor in memory at a time
Views = list[tuple[NDArray[Any], tuple[int, ...]]]


def same(packed: NDArray[Any]) -> Views:
    """One tensor, stored as it is here."""
    return [(packed, packed.shape)]


def transposed(packed: NDArray[Any]) -> Views:
    """One linear layer ``[in, out]``."""
    return [linear(packed, 1)]


def depthwise(packed: NDArray[Any]) -> Views:
    """One depthwise convolution ``[taps, channels]``."""
    return [(packed.T[:, None], (packed.shape[1], 1, packed.shape[0]))]


def qkv(packed: NDArray[Any]) -> Views:
    """Queries, keys and values ``[in, K, G + 2, D]``: three linear layers."""
    return [linear(part, 1) for part in _by_group(packed)]


def qk(packed: NDArray[Any]) -> Views:
    """Queries, and keys which are values too, ``[in, K, G + 1, D]``: two linear layers."""
    return [linear(packed[..., :-1, :], 1), linear(packed[..., -1, :], 1)]


def qkv_bias(packed: NDArray[Any]) -> Views:
    """The biases of ``qkv``: ``[K, G + 2, D]``."""
    return [linear(part, 0) for part in _by_group(packed)]


def flat(packed: NDArray[Any]) -> Views:
    """A vector, whose elements have several axes here."""
    return [(packed, (packed.size,))]


def heads_in(packed: NDArray[Any]) -> Views:
    """One linear layer whose inputs are heads: ``[H, D, out]``."""
    return [linear(packed, 2)]


def beside(packed: NDArray[Any]) -> Views:
    """Linear layers beside each other, as gate and up: ``[in, layers, ...]``."""
    return [linear(packed[:, i], 1) for i in range(packed.shape[1])]


def beside_bias(packed: NDArray[Any]) -> Views:
    """The biases of ``beside``: ``[layers, ...]``."""
    return [linear(part, 0) for part in packed]


def outputs_first(packed: NDArray[Any]) -> Views:
    """One linear layer ``[..., in]``, stored as it is here."""
    return [(packed, (prod(packed.shape[:-1]), packed.shape[-1]))]


# Experts: gate and up ``[N, 1, in, 2 * I]``, gates before ups; biases ``[N, 1, 2 * I]``; down ``[N, I, out]``.


def each_gate_up(packed: NDArray[Any]) -> Views:
    """Experts' gates and ups, each a linear layer of its own: gate 0, up 0, gate 1, up 1, ..."""
    inner = packed.shape[-1] // 2
    return [linear(part, 1) for (expert,) in packed for part in (expert[:, :inner], expert[:, inner:])]


def each_transposed(packed: NDArray[Any]) -> Views:
    """Experts' ``[N, in, out]``, each a linear layer of its own."""
    return [view for expert in packed for view in transposed(expert)]


def all_gate_up(packed: NDArray[Any]) -> Views:
    """All in one tensor ``[N, 2 * I, in]``, an expert's gate before its up."""
    return all_transposed(packed[:, 0])


def all_transposed(packed: NDArray[Any]) -> Views:
    """``[N, in, out]`` in one tensor ``[N, out, in]``."""
    view = packed.transpose(0, 2, 1)
    return [(view, view.shape)]


def halves(packed: NDArray[Any]) -> Views:
    """``[N, in, 2 * I]``, or biases ``[N, 2 * I]``: gates before ups."""
    return same(packed[:, 0])


def interleaved(packed: NDArray[Any]) -> Views:
    """``[N, in, 2 * I]``, or biases ``[N, 2 * I]``: gates and ups take turns."""
    whole = packed[:, 0]
    return [(whole.reshape(*whole.shape[:-1], 2, -1).swapaxes(-1, -2), whole.shape)]


def _by_group(packed: NDArray[Any]) -> list[NDArray[Any]]:
    return [packed[..., :-2, :], packed[..., -2, :], packed[..., -1, :]]


def linear(part: NDArray[Any], inputs: int) -> tuple[NDArray[Any], tuple[int, ...]]:
    """A linear layer's view and shape: outputs first, inputs (the ``inputs`` leading axes here) last."""
    view = part.transpose(*range(inputs, part.ndim), *range(inputs))
    outputs = prod(part.shape[inputs:])
    return view, (outputs, prod(part.shape[:inputs])) if inputs else (outputs,)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint, of ``shape``; or its ``rows`` alone, where what is apart here is stored in one."""

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None


def sources_of(spec: ParamSpec) -> list[SourceTensor]:
    """What each view of ``spec.packing`` is, as the checkpoint stores it: a tensor, or some rows of one.

    A name that stands in ``spec.sources`` several times in a row is one tensor, whose rows the views take in turn: so
    does Phi 3 store queries, keys and values.
    """
    shapes = [shape for _, shape in spec.packing(np.broadcast_to(np.uint8(0), spec.shape))]
    found: list[SourceTensor] = []
    for name, together in groupby(zip(spec.sources, shapes, strict=True), key=lambda pair: pair[0]):
        parts = [shape for _, shape in together]
        if len(parts) == 1:
            found.append(SourceTensor(name, parts[0]))
            continue
        ends = list(accumulate(shape[0] for shape in parts))
        whole = (ends[-1], *parts[0][1:])
        found += [SourceTensor(name, whole, slice(end - shape[0], end)) for end, shape in zip(ends, parts, strict=True)]
    return found


def pack(spec: ParamSpec, sources: Sequence[Callable[[slice], NDArray[Any]]], dtype: Any) -> NDArray[Any]:
    """One parameter in ``dtype``, from functions that read rows of its sources, a part of a tensor at a time."""
    packed = np.empty(spec.shape, spec.dtype(dtype))
    for (view, shape), source in zip(spec.packing(packed), sources, strict=True):
        rows = shape[0] // view.shape[0]  # of the tensor, for one of the view
        step = max(1, _PART * view.shape[0] // max(1, prod(shape)))
        for at in range(0, view.shape[0], step):
            part = view[at : at + step]
            part[...] = source(slice(at * rows, (at + len(part)) * rows)).reshape(part.shape)
    return packed


def unpack(spec: ParamSpec, packed: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
    """The checkpoint's tensors of one parameter by name, in its dtype: the inverse of ``pack``."""
    views = [np.ascontiguousarray(view).reshape(shape) for view, shape in spec.packing(packed)]
    named = groupby(zip(spec.sources, views, strict=True), key=lambda pair: pair[0])
    whole = ((name, [view for _, view in together]) for name, together in named)
    return [(name, parts[0] if len(parts) == 1 else np.concatenate(parts)) for name, parts in whole]
