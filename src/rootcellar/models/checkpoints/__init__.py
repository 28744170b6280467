"""Checkpoints as they are published: tensors by name, whatever they are stored as. No format is known outside.

A *format* says how one tensor is stored by several others (codes, scales); one small file each. Arithmetic is never in
a format's own types: what is stored so is expanded as it is read, a part at a time, and lies in memory as the dtype and
``quantization`` of the engine say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints import awq, compressed_tensors, fp8, gptq, mxfp4
from rootcellar.models.checkpoints.coded import Format, as_saved

FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "mxfp4": mxfp4.read,
}
"""By ``quant_method`` of a config's ``quantization_config``: from that object to the format."""


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint with this ``config.json``; ``ModelError`` for one that is not known."""
    described = config.get("quantization_config")
    if not described:
        return as_saved
    method = described.get("quant_method", "unnamed")
    if method not in FORMATS:
        known = ", ".join(FORMATS)
        raise ModelError(
            f"quantised weights ({method}) are not supported; known: {known}; or use the float checkpoint of this model"
        )
    return FORMATS[method](described)
