"""AWQ (Lin et al. 2023), as AutoAWQ's GEMM version packs it: 4 bits, a scale and a zero for each group of inputs.

``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``, whose eight outputs lie in a word in the
order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits; ``scales`` ``[groups, out]``. A weight is ``(q - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints.coded import Coded, Files, Format, chosen, fits, nibbles

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where outputs 0, 1, 2, ... lie


def read(config: Mapping[str, Any]) -> Format:
    """See ``FORMATS``."""
    chosen(config, "bits", (4,), config.get("w_bit", 4))
    chosen(config, "version", ("gemm", "GEMM"), "gemm")
    return _of


def _of(files: Files, name: str) -> Coded | None:
    base = name.removesuffix(".weight")
    weight, zeros, scales = (f"{base}.{part}" for part in ("qweight", "qzeros", "scales"))
    if weight not in files:
        return None
    inputs, words = files.shape(weight)
    groups = files.shape(scales)[0] if scales in files else 1
    fits(files, weight, (inputs, words), "I32")
    fits(files, zeros, (groups, words), "I32")
    fits(files, scales, (groups, 8 * words), "F16", "BF16", "F32")
    if inputs % groups:
        raise ModelError(f"tensor {scales!r} has {groups} groups of {inputs} inputs")
    return Coded((weight, zeros, scales), (8 * words, inputs), partial(_read, files, weight, zeros, scales))


def _read(files: Files, weight: str, zeros: str, scales: str, rows: slice) -> NDArray[np.float32]:
    first, stop, _ = rows.indices(8 * files.shape(weight)[1])
    words, part = slice(first // 8, -(-stop // 8)), slice(first % 8, first % 8 + stop - first)
    codes = nibbles(files.read(weight)[:, words], _ORDER)[:, part]
    scale = files.read(scales)[:, first:stop].astype(np.float32)
    zero = nibbles(files.read(zeros)[:, words], _ORDER)[:, part].astype(np.float32)
    out = codes.reshape(len(scale), -1, codes.shape[1]).astype(np.float32)
    out -= zero[:, None]
    out *= scale[:, None]
    return out.reshape(codes.shape).T
