"""MXFP4 (OCP Microscaling Formats 1.0; gpt-oss): E2M1 in blocks of 32 inputs, two to a byte, the first one low.

``X_blocks`` uint8 ``[experts, out, blocks, 16]`` and ``X_scales`` uint8 ``[experts, out, blocks]``, an exponent of two
with a bias of 127, are the tensor ``X`` ``[experts, in, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints.coded import Coded, Files, Format, fits

_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)
"""The two values of each byte, float32 ``[256, 2]``."""


def read(config: Mapping[str, Any]) -> Format:  # noqa: ARG001 - there is one kind
    """See ``FORMATS``."""
    return _of


def _of(files: Files, name: str) -> Coded | None:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    if blocks not in files:
        return None
    shape = files.shape(blocks)
    if len(shape) != 4 or shape[3] != 16:
        raise ModelError(f"tensor {blocks!r} has shape {list(shape)}: blocks are [experts, outputs, blocks, 16]")
    fits(files, blocks, shape, "U8")
    fits(files, scales, shape[:3], "U8")
    whole = (shape[0], shape[2] * 32, shape[1])
    return Coded((blocks, scales), whole, partial(_read, files, blocks, scales))


def _read(files: Files, blocks: str, scales: str, rows: slice) -> NDArray[np.float32]:
    codes, exponents = files.read(blocks, rows), files.read(scales, rows)
    values = _PAIRS[codes].reshape(*exponents.shape, 32)
    values *= np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)[..., None]
    return values.reshape(*exponents.shape[:2], -1).swapaxes(1, 2)
