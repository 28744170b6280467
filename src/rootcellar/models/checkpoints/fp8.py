"""FP8: ``weight`` in E4M3 and what it is multiplied by, in blocks (DeepSeek V3, Qwen), by output, or one for all.

Blocks as in DeepSeek-V3's ``weight_dequant``: ``weight_scale_inv [ceil(out / m), ceil(in / n)]``. Activations, which
such checkpoints are meant to narrow as well, stay wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints.coded import Coded, Files, Format

_SCALES = ("F32", "BF16", "F16", "F8_E8M0")


def read(config: Mapping[str, Any]) -> Format:
    """See ``FORMATS``."""
    block = config.get("weight_block_size") or (128, 128)
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise ModelError(f"quantization_config.weight_block_size={block!r} must be two whole numbers of at least 1")
    return partial(_of, (block[0], block[1]))


def _of(block: tuple[int, int], files: Files, name: str) -> Coded | None:
    for suffix in ("_scale_inv", "_scale"):
        if name in files and name + suffix in files:
            return scaled(files, name, name + suffix, block)
    return None


def scaled(files: Files, name: str, scale: str, block: tuple[int, int] | None, dtype: str = "F8_E4M3") -> Coded:
    """The matrix ``name`` of ``dtype`` times ``scale``: of blocks, of each output, or one number.

    Raises ``ModelError`` where these do not fit each other.
    """
    shape, found = files.shape(name), files.shape(scale)
    outputs, inputs = shape if len(shape) == 2 else (0, 0)
    blocks = block and (-(-outputs // block[0]), -(-inputs // block[1]))
    if np.prod(found) == 1:
        step = (max(1, outputs), max(1, inputs))
    elif found in ((outputs, 1), (outputs,)):
        step = (1, max(1, inputs))
    elif block and found == blocks:
        step = block
    else:
        wanted = f"{list(blocks)} (blocks of {list(block or ())})" if blocks else f"[{outputs}, 1]"
        raise ModelError(f"tensor {scale!r} has shape {list(found)}, but {name!r} {list(shape)} asks for {wanted}")
    if len(shape) != 2 or files.dtype(name) != dtype or files.dtype(scale) not in _SCALES:
        raise ModelError(
            f"tensors {name!r} and {scale!r} are {files.dtype(name)} {list(shape)} and {files.dtype(scale)}: a matrix "
            f"of {dtype} and one of {' or '.join(_SCALES)} are read"
        )
    return Coded((name, scale), shape, partial(_read, files, name, scale, step))


def _read(files: Files, name: str, scale: str, step: tuple[int, int], rows: slice) -> NDArray[np.float32]:
    first, stop, _ = rows.indices(files.shape(name)[0])
    out: NDArray[np.float32] = files.read(name, slice(first, stop)).astype(np.float32)
    scales = files.read(scale).astype(np.float32)
    grid = scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1)
    wide = np.repeat(grid, step[1], axis=1)[:, : out.shape[1]]
    at = first
    while at < stop:  # a row of blocks at a time
        end = min(stop, (at // step[0] + 1) * step[0])
        out[at - first : end - first] *= wide[at // step[0]]
        at = end
    return out
