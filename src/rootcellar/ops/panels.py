"""Weights packed for products with few rows: in panels that a kernel reads from end to end, some as small integers.

A weight is an array of any axes, of which some, the first or the last, are a product's *inputs* and the others its
*outputs*. Packed, it is one to three arrays (``ops/native/products.h`` draws them)::

    words   [*outputs but the last, panels, *inputs but the last, words, 16, elements of a word]
    scales  [*outputs but the last, panels, *inputs but the last, groups, 16]   (bfloat16; integers only)
    least   the same                                                           (bfloat16; ``w4`` only)

where a panel is 16 of the last outputs (the last panel filled up with zeros), and a word of 32 bits has 1, 2, 4 or 8 of
the last inputs (of integers the even ones first). So each axis that tensor parallelism splits is still an axis. Without
kernels XLA computes with what :func:`unpacked` gives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

COLUMNS = 16
"""Outputs of a panel."""
GROUP = 32
"""Inputs that share a scale, at most."""
_STATIC: dict[str, Any] = {"static": True}
_BF16 = np.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class WeightForm:
    """How the weights of a packed array are written.

    Attributes:
        name: of the setting, and for the kernel.
        word: inputs that a word of 32 bits has.
        element: the dtype of ``words``.
        parts: elements of a word.
        scaled: how many arrays go with the words: scales, then least values.
        encode: float32 ``[..., groups, group, 16]`` to the integers in that shape, and those arrays
            ``[..., groups, 16]``; None: they are floats.
        floats: what weights are converted to where they are not integers; ``element`` has its bits.
        vocabulary: the name of the form that the vocabulary's vectors have beside it; empty: the same. (Each token is
            told from all others by them.)
    """

    name: str
    word: int
    element: np.dtype[Any]
    parts: int
    scaled: int = 0
    encode: Callable[[NDArray[np.float32]], tuple[NDArray[Any], ...]] | None = None
    floats: np.dtype[Any] | None = None
    vocabulary: str = ""

    @property
    def grouped(self) -> bool:
        """Whether weights are integers that share scales."""
        return self.encode is not None


def _to_8_bits(w: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
    """Symmetric, to the nearest of 255 steps."""
    scale = np.abs(w).max(axis=-2) / np.float32(127)
    scale = _round(scale, up=True)
    wide = scale.astype(np.float32)[..., None, :]
    codes = np.rint(np.divide(w, wide, out=np.zeros_like(w), where=wide > 0))
    return np.clip(codes, -127, 127).astype(np.int8), scale


def _to_4_bits(w: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
    """16 steps from a least value on; of some ranges, cut at both ends, the one with the least square error."""
    low, high = w.min(axis=-2), w.max(axis=-2)
    best: list[NDArray[Any]] | None = None
    for cut in (0.0, 0.03, 0.06, 0.1):
        least = _round(low + np.float32(cut) * (high - low))
        start = least.astype(np.float32)
        scale = _round(np.maximum((high - np.float32(cut) * (high - low) - start) / np.float32(15), 0))
        step, start = scale.astype(np.float32)[..., None, :], start[..., None, :]
        codes = np.rint(np.divide(w - start, step, out=np.zeros_like(w), where=step > 0))
        codes = np.clip(codes, 0, 15)
        error = np.square(codes * step + start - w).sum(axis=-2)
        found = [codes.astype(np.uint8), scale, least, error]
        if best is None:
            best = found
        else:
            better = error < best[3]
            both = zip(found, best, strict=True)
            best = [np.where(better[..., None, :] if a.ndim == w.ndim else better, a, b) for a, b in both]
    assert best is not None
    return best[0], best[1], best[2]


def _round(x: NDArray[np.float32], *, up: bool = False) -> NDArray[Any]:
    """To bfloat16; ``up``: not below ``x``, which is not negative."""
    near = x.astype(_BF16)
    if up:
        near = (near.view(np.uint16) + (near.astype(np.float32) < x)).astype(np.uint16).view(_BF16)
    return near


HOLDINGS: Mapping[str, WeightForm] = {
    holding.name: holding
    for holding in (
        WeightForm("float32", 1, np.dtype(np.float32), 1, floats=np.dtype(np.float32)),
        # (Bits that NumPy knows: where a bfloat16 array lies cannot be asked without another that JAX makes of it.)
        WeightForm("bfloat16", 2, np.dtype(np.uint16), 2, floats=_BF16),
        WeightForm("w8", 4, np.dtype(np.int8), 4, 1, _to_8_bits),
        WeightForm("w4", 8, np.dtype(np.uint8), 4, 2, _to_4_bits, vocabulary="w8"),
    )
}


@functools.partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Packed:
    """A packed weight of ``shape``, whose axes ``inputs`` a product sums over.

    Attributes:
        arrays: words, scales, least values, as far as its holding has them.
        group: inputs that share a scale.
        native: whether the kernels compute with it; otherwise XLA does.
        fixed: whether they always do, each sum in one order whatever rows there are beside it.
    """

    arrays: tuple[Array, ...]
    holding: str = field(metadata=_STATIC)
    shape: tuple[int, ...] = field(metadata=_STATIC)
    inputs: tuple[int, ...] = field(metadata=_STATIC)
    group: int = field(metadata=_STATIC)
    native: bool = field(metadata=_STATIC)
    fixed: bool = field(default=False, metadata=_STATIC)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes that a product gives."""
        return tuple(i for i in range(len(self.shape)) if i not in self.inputs)


@dataclass(frozen=True)
class Packer:
    """Packs weights of one shape; see :func:`packer`."""

    holding: WeightForm
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    group: int

    @property
    def _outputs(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i not in self.inputs)

    def axes(self, named: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What the axes of each array are called, where the weight's are called ``named``."""
        order = [named[i] for i in (*self._outputs, *self.inputs)]
        return [(*order, None, None)] + [(*order, None)] * self.holding.scaled

    def shapes(self) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of each array."""
        outputs, inputs = ([self.shape[i] for i in axes] for axes in (self._outputs, self.inputs))
        lead = (*outputs[:-1], -(-outputs[-1] // COLUMNS), *inputs[:-1])
        words = (*lead, inputs[-1] // self.holding.word, COLUMNS, self.holding.parts)
        return [(words, self.holding.element)] + [
            ((*lead, inputs[-1] // self.group, COLUMNS), _BF16)
        ] * self.holding.scaled

    def pack(self, weight: Any) -> list[NDArray[Any]]:
        """The arrays of a float ``weight``."""
        holding, count = self.holding, len(self.inputs)
        moved = np.transpose(np.asarray(weight), (*self._outputs, *self.inputs))
        last = len(self._outputs) - 1
        spare = -moved.shape[last] % COLUMNS
        if spare:
            moved = np.pad(moved, [(0, spare if i == last else 0) for i in range(moved.ndim)])
        shape = moved.shape
        panels = moved.reshape(*shape[:last], shape[last] // COLUMNS, COLUMNS, *shape[last + 1 :])
        panels = np.moveaxis(panels, last + 1, -1)  # [..., panels, *inputs, 16]
        extra: list[NDArray[Any]] = []
        if holding.encode is None:
            codes = panels.astype(holding.floats).view(holding.element)
        else:
            whole = np.ascontiguousarray(panels, np.float32)
            codes, *extra = holding.encode(whole.reshape(*whole.shape[:-2], -1, self.group, COLUMNS))
        codes = codes.reshape(*panels.shape[:-2], -1, holding.word, COLUMNS).swapaxes(-1, -2)
        if holding.grouped:
            codes = np.concatenate([codes[..., ::2], codes[..., 1::2]], axis=-1)
        if holding.word > holding.parts:  # two integers to a byte
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        assert count + len(self._outputs) + 2 == codes.ndim
        return [np.ascontiguousarray(array) for array in (codes, *extra)]

    def packed(self, arrays: Sequence[Any], *, native: bool, fixed: bool = False) -> Packed:
        """A packed weight of ``arrays``."""
        return Packed(tuple(arrays), self.holding.name, self.shape, self.inputs, self.group, native, fixed)


def packer(holding: str, shape: Sequence[int], inputs: Sequence[int]) -> Packer | None:
    """What packs weights of ``shape`` so; None: they stay as they are.

    That is where words or groups do not divide the inputs, or filling up panels would cost more than an eighth.
    """
    if not inputs:
        return None
    found, last = HOLDINGS[holding], shape[inputs[-1]]
    length = shape[next(i for i in reversed(range(len(shape))) if i not in inputs)]
    group = math.gcd(last, GROUP)
    fits = group >= 8 if found.grouped else last % found.word == 0
    if not fits or -length % COLUMNS > length // 8:
        return None
    return Packer(found, tuple(shape), tuple(inputs), group if found.grouped else 1)


def unpacked(w: Packed) -> Array:
    """The weight, float32 in its own shape."""
    outputs, inputs = ([w.shape[i] for i in axes] for axes in (w.outputs, w.inputs))
    values = _values(w, w.arrays[0].swapaxes(-1, -2), *w.arrays[1:])  # [..., panels, *inputs, 16]
    last = len(outputs) - 1
    values = jnp.moveaxis(values, -1, last + 1).reshape(*outputs[:-1], -1, *inputs)
    values = jax.lax.slice_in_dim(values, 0, outputs[-1], axis=last)
    return jnp.transpose(values, np.argsort([*w.outputs, *w.inputs]))


def rows(w: Packed, which: Array) -> Array:
    """Rows ``which`` int32 ``[T]`` of a packed matrix whose inputs are its last axis: float32 ``[T, inputs]``."""
    arrays = [array[which // COLUMNS, :, which % COLUMNS] for array in w.arrays]  # [T, words, parts], [T, groups]
    arrays[0] = arrays[0][..., None]
    return _values(w, *arrays[:1], *(array[..., None] for array in arrays[1:]))[..., 0]


def _values(w: Packed, codes: Array, *scaled: Array) -> Array:
    """Float32 ``[..., inputs, C]`` of ``codes`` [..., words, parts, C] and what they are scaled by [..., groups, C]."""
    holding = HOLDINGS[w.holding]
    if holding.word > holding.parts:
        codes = jnp.stack([codes & 15, codes >> 4], axis=-2)  # [..., parts, 2, C]
        codes = codes.reshape(*codes.shape[:-3], holding.word, codes.shape[-1])
    if holding.grouped:
        codes = jnp.stack(jnp.split(codes, 2, axis=-2), axis=-2).reshape(codes.shape)
    if holding.floats is not None:
        codes = jax.lax.bitcast_convert_type(codes, holding.floats)
    values = codes.astype(jnp.float32)
    *lead, words, count, columns = values.shape
    if not holding.grouped:
        return values.reshape(*lead, words * count, columns)
    values = values.reshape(*lead, -1, w.group, columns)
    scale, *least = (array.astype(jnp.float32)[..., None, :] for array in scaled)
    values = values * scale + least[0] if least else values * scale
    return values.reshape(*lead, words * count, columns)
