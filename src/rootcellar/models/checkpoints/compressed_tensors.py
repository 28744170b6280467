"""compressed-tensors (vLLM's llm-compressor): integers of 4 bits in words, integers of 8 bits, or FP8; with scales.

``pack-quantized``: ``weight_packed`` int32 ``[out, in / 8]`` from the lowest bits on, around 8, ``weight_scale``
``[out, groups]``, ``weight_zero_point`` int32 ``[out / 8, groups]`` packed along the outputs where the scheme is not
symmetric, and ``weight_g_idx`` where inputs are in another order. ``float-quantized`` and ``int-quantized``: ``weight``
and ``weight_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints.coded import Coded, Files, Format, chosen, fits, nibbles
from rootcellar.models.checkpoints.fp8 import scaled

_MATRICES = {"float-quantized": "F8_E4M3", "int-quantized": "I8", "naive-quantized": "F8_E4M3"}


def read(config: Mapping[str, Any]) -> Format:
    """See ``FORMATS``."""
    form = chosen(config, "format", ("pack-quantized", *_MATRICES, "dense"))
    schemes = [each.get("weights") or {} for each in (config.get("config_groups") or {}).values()]
    for scheme in schemes if form == "pack-quantized" else ():
        chosen(scheme, "num_bits", (4,))
    if form == "pack-quantized":
        return _packed
    structures = {tuple(each["block_structure"]) for each in schemes if each.get("block_structure")}
    if len(structures) > 1:
        raise ModelError(f"quantization_config names blocks of several sizes: {sorted(structures)}; one is supported")
    return partial(_matrix, structures.pop() if structures else None, _MATRICES.get(form))


def _matrix(block: tuple[int, int] | None, dtype: str | None, files: Files, name: str) -> Coded | None:
    if name not in files or f"{name}_scale" not in files:
        return None
    if f"{name}_zero_point" in files:
        raise ModelError(f"tensor {name}_zero_point: integers of 8 bits are supported where their scheme is symmetric")
    return scaled(files, name, f"{name}_scale", block, dtype or files.dtype(name))


def _packed(files: Files, name: str) -> Coded | None:
    packed, scale, zeros, order = (f"{name}_{part}" for part in ("packed", "scale", "zero_point", "g_idx"))
    if packed not in files:
        return None
    outputs, words = files.shape(packed)
    fits(files, packed, (outputs, words), "I32")
    groups = files.shape(scale)[1] if scale in files and len(files.shape(scale)) == 2 else 1
    fits(files, scale, (outputs, groups), "F32", "BF16", "F16")
    inputs = int(files.read(f"{name}_shape")[1]) if f"{name}_shape" in files else 8 * words
    if not 8 * words - 8 < inputs <= 8 * words or inputs % groups:
        raise ModelError(f"tensor {packed!r} {[outputs, words]} with {groups} groups stands for no {inputs} inputs")
    parts, group = [packed, scale], np.arange(inputs) // (inputs // groups)
    if f"{name}_shape" in files:
        parts.append(f"{name}_shape")
    if zeros in files:
        fits(files, zeros, (-(-outputs // 8), groups), "I32")
        parts.append(zeros)
    if order in files and not (files.read(order) < 0).any():
        group = files.read(order)
    if group.shape != (inputs,) or group.max() >= groups:
        raise ModelError(f"tensor {order!r} names groups that are not there: there are {groups} of {inputs} inputs")
    parts += [order] if order in files else []
    return Coded(tuple(parts), (outputs, inputs), partial(_read, files, packed, scale, zeros, group))


def _read(files: Files, packed: str, scale: str, zeros: str, group: NDArray[Any], rows: slice) -> NDArray[np.float32]:
    out = nibbles(files.read(packed, rows))[:, : len(group)].astype(np.float32)
    if zeros in files:
        out -= nibbles(files.read(zeros).T).T[rows].astype(np.float32)[:, group]
    else:
        out -= 8
    out *= files.read(scale, rows).astype(np.float32)[:, group]
    return out
