"""GPTQ (Frantar et al. 2022), as AutoGPTQ and GPTQModel pack it: 4 bits, a scale and a zero for each group of inputs.

``qweight`` int32 ``[in / 8, out]`` and ``qzeros`` int32 ``[groups, out / 8]``, from the lowest bits on, ``scales``
``[groups, out]``; input ``i`` is of group ``g_idx[i]``. A weight is ``(q - zero) * scale``; files before ``gptq_v2``
store zeros less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints.coded import Coded, Files, Format, chosen, fits, nibbles


def read(config: Mapping[str, Any]) -> Format:
    """See ``FORMATS``."""
    chosen(config, "bits", (4,))
    form = chosen(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return partial(_of, 1 if form == "gptq" else 0)


def _of(less: int, files: Files, name: str) -> Coded | None:
    base = name.removesuffix(".weight")
    weight, zeros, scales, groups_of = (f"{base}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    if weight not in files:
        return None
    words, outputs = files.shape(weight)
    groups = files.shape(scales)[0] if scales in files else 1
    fits(files, weight, (words, outputs), "I32")
    fits(files, zeros, (groups, outputs // 8), "I32")
    fits(files, scales, (groups, outputs), "F16", "BF16", "F32")
    parts: tuple[str, ...] = (weight, zeros, scales)
    group: NDArray[Any] = np.arange(8 * words) // -(-8 * words // groups)
    if groups_of in files:
        fits(files, groups_of, (8 * words,), "I32")
        parts, group = (*parts, groups_of), files.read(groups_of)
    if group.min() < 0 or group.max() >= groups:
        raise ModelError(f"tensor {groups_of!r} names groups that are not there: there are {groups}")
    return Coded(parts, (outputs, 8 * words), partial(_read, files, weight, zeros, scales, group, less))


def _read(
    files: Files, weight: str, zeros: str, scales: str, group: NDArray[Any], less: int, rows: slice
) -> NDArray[np.float32]:
    codes = nibbles(files.read(weight)[:, rows].T)  # [out, in]
    scale = files.read(scales)[:, rows].astype(np.float32).T
    zero = (nibbles(files.read(zeros))[:, rows].astype(np.float32) + less).T
    out = codes.astype(np.float32)
    out -= zero[:, group]
    out *= scale[:, group]
    return out
