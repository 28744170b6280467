"""GGUF (llama.cpp): one file of tensors in its own names and types, read through the package ``gguf``.

The folder has ``config.json`` and the tokenizer's files beside it; what the file says of these is not read. Llama's
queries and keys are stored with the halves of each head taking turns, Gemma's norms around one.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
_WHOLE = slice(None)


class GgufTensors:
    """The tensors of a ``.gguf`` file by their names in Hugging Face's checkpoints; see ``coded.Files``.

    Raises ``ModelError``: the package is missing, the file is not whole, its architecture is not known.
    """

    def __init__(self, path: Path):
        self.folder, self.listed = path.parent, path.name
        try:
            import gguf
        except ImportError:
            raise ModelError(f"{path} needs the package gguf: pip install 'rootcellar[gguf]'") from None
        self._gguf = gguf
        try:
            self._reader = gguf.GGUFReader(path)
            self._arch = str(self._field("general.architecture"))
        except (ValueError, OSError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ModelError(f"{path} is not a whole GGUF file: {error}") from None
        if self._arch not in ARCHITECTURES:
            raise ModelError(f"{path} holds {self._arch!r}; known: {', '.join(map(repr, ARCHITECTURES))}")
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self._arch)
        self._map = gguf.get_tensor_name_map(arch, int(self._field(f"{self._arch}.block_count")))
        self._used: dict[str, str] = {}

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise KeyError(f"it lacks {name}")
        return field.contents()

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def _own(self, name: str) -> str:
        """What the file calls a tensor; nothing where it has none."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        return found if found in self._tensors else ""

    def __contains__(self, name: str) -> bool:
        return bool(self._own(name))

    def names(self) -> list[str]:
        """Of all tensors: in Hugging Face's names those that were asked for, the others in the file's."""
        return sorted(self._used.get(own, own) for own in self._tensors if own != "rope_freqs.weight")

    def place(self, name: str) -> Path:  # noqa: ARG002
        """The file that a tensor lies in."""
        return self.folder / self.listed

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Files``."""
        self._used[self._own(name)] = name
        return tuple(int(size) for size in reversed(self._tensors[self._own(name)].shape))

    def dtype(self, name: str) -> str:  # noqa: ARG002 - every type is read as this one
        """See ``Files``."""
        return "F32"

    def read(self, name: str, rows: slice = _WHOLE) -> NDArray[Any]:
        """See ``Files``: float32, whatever the file holds."""
        tensor = self._tensors[self._own(name)]
        where: Any = self._turned(name)[rows] if self._is_turned(name) else rows
        try:
            values: NDArray[Any] = self._gguf.quants.dequantize(tensor.data[where], tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(f"tensor {tensor.name!r} in {self.place(name)}: {error}") from None
        values = values.astype(np.float32, copy=False)
        return values - np.float32(1) if self._arch.startswith("gemma") and name.endswith("norm.weight") else values

    def _is_turned(self, name: str) -> bool:
        return self._arch == "llama" and ("q_proj" in name or "k_proj" in name)

    def _turned(self, name: str) -> NDArray[Any]:
        """The file's rows in the order of Hugging Face's."""
        count = "head_count" if "q_proj" in name else "head_count_kv"
        heads = int(self._field(f"llama.attention.{count}"))
        return np.arange(self.shape(name)[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
