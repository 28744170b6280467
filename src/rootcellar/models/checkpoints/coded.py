"""A tensor that files hold as others: which, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError

Read = Callable[[slice], NDArray[Any]]
"""Rows ``[start, stop)`` of a tensor, along its first axis."""


class Files(Protocol):
    """What lies in the files of a checkpoint, tensor by tensor."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        ...

    def dtype(self, name: str) -> str:
        """Its dtype, as safetensors calls it: ``F8_E4M3``."""
        ...

    def read(self, name: str, rows: slice = ...) -> NDArray[Any]:
        """It, or some rows of it."""
        ...


@dataclass(frozen=True)
class Coded:
    """How a tensor of ``shape`` is made of the tensors ``parts``; ``read`` gives floats."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    read: Read


Format = Callable[[Files, str], Coded | None]
"""How files hold a tensor by its family's name; None: as itself, or not at all."""


def as_saved(files: Files, name: str) -> None:
    """The format of checkpoints that hold each tensor as itself."""


def chosen(config: Mapping[str, Any], name: str, known: Sequence[Any], default: Any = None) -> Any:
    """A field of ``quantization_config`` that is one of ``known``; ``ModelError`` for another."""
    value = config.get(name)
    value = default if value is None else value
    if value not in known:
        raise ModelError(f"quantization_config.{name}={value!r} is not supported; known: {', '.join(map(repr, known))}")
    return value


def fits(files: Files, name: str, shape: tuple[int, ...], *dtypes: str) -> None:
    """Raise ``ModelError`` unless a part is there with this shape and one of these dtypes."""
    if name not in files:
        raise ModelError(f"tensor {name!r} is missing, which belongs to what is beside it")
    if files.shape(name) != shape or files.dtype(name) not in dtypes:
        raise ModelError(
            f"tensor {name!r} is {files.dtype(name)} {list(files.shape(name))}, and should be "
            f"{' or '.join(dtypes)} {list(shape)}"
        )


def nibbles(words: NDArray[Any], order: Sequence[int] = range(8)) -> NDArray[np.uint8]:
    """The eight 4-bit integers of each 32-bit word, along the last axis; ``order``: which of them come in turn."""
    shifts = np.array([4 * place for place in order], np.uint32)
    wide = (words.astype(np.uint32, copy=False)[..., None] >> shifts) & np.uint32(15)
    return wide.astype(np.uint8).reshape(*words.shape[:-1], -1)
