"""The safetensors of a folder: one file, or the shards of an index, opened and read a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open

from rootcellar.errors import ModelError
from rootcellar.models.files import find_file, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WHOLE = slice(None)
_TYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    **{f"{sign}{bits}": f"<{sign.lower()}{bits // 8}" for sign in "IU" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


class SafeTensors:
    """The files of a folder; see ``coded.Files``.

    Raises ``ModelError`` that names the file or tensor: no weights, a file that is missing or not whole, an index that
    is none or that names what is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._where = _tensor_files(folder)
        self.listed = INDEX if self._where else SINGLE
        self._headers: dict[str, Any] = {}
        self._begins: dict[str, int] = {}
        for name in sorted(set(self._where.values())) or [SINGLE]:
            self._begins[name], self._headers[name] = _header(folder, name)
        if not self._where:  # no index: the one file's own header is the list
            self._where = dict.fromkeys(self._headers[SINGLE], SINGLE)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted(self._where)

    def place(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self.folder / self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Files``."""
        return tuple(self._header(name)["shape"])

    def dtype(self, name: str) -> str:
        """See ``Files``."""
        dtype: str = self._header(name)["dtype"]
        return dtype

    def read(self, name: str, rows: slice = _WHOLE) -> NDArray[Any]:
        """See ``Files``. Not through the library's mapping, whose pages would count as this process's memory."""
        header, dtype = self._header(name), np.dtype(_TYPES[self.dtype(name)])
        shape = header["shape"]
        start, stop, _ = rows.indices(shape[0] if shape else 1)
        row = prod(shape[1:])
        with self.place(name).open("rb") as file:
            file.seek(self._begins[self._where[name]] + header["data_offsets"][0] + start * row * dtype.itemsize)
            data = np.fromfile(file, np.uint8, (stop - start) * row * dtype.itemsize)
        if data.size != (stop - start) * row * dtype.itemsize:
            raise ModelError(f"{self.place(name)} ends within tensor {name!r}: it was cut while it was read")
        return data.view(dtype).reshape((stop - start, *shape[1:]) if shape else ())

    def _header(self, name: str) -> Any:
        file = self._where[name]
        if name not in self._headers[file]:
            raise ModelError(f"tensor {name!r} should be in {self.folder / file}, says {INDEX}, but is not there")
        return self._headers[file][name]


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a folder that are read, by name. Raises ``ModelError`` as ``SafeTensors`` does."""
    return [_path(folder, name) for name in sorted(set(_tensor_files(folder).values())) or [SINGLE]]


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the index; empty when there is a single file instead."""
    if not folder.is_dir():
        raise ModelError(f"no model folder {str(folder)!r}")
    if find_file(folder, INDEX) is None:
        if find_file(folder, SINGLE) is not None:
            return {}
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".safetensors"}))
        raise ModelError(
            f"no weights in {folder}: looked for {SINGLE}, {INDEX} and *.gguf, found {found or 'no weight file'}; "
            'convert other formats with save_pretrained, or use load_format="dummy"'
        )
    where = (read_json(folder / INDEX) or {}).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{folder / INDEX} is not an index with a weight_map, from names of tensors to names of files")
    return where


def _path(folder: Path, name: str) -> Path:
    path = find_file(folder, name)
    if path is None:
        raise ModelError(f"{folder / name} is missing, which {INDEX} names: the download is not complete")
    return path


def _header(folder: Path, name: str) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, in bytes, and each one's dtype, shape and place there."""
    path = _path(folder, name)
    try:
        with safe_open(path, framework="numpy"):  # the library says whether header and file are whole
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return 8 + length, {tensor: each for tensor, each in header.items() if tensor != "__metadata__"}


def read_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of what would be one file, by name. ``ModelError`` where it is none."""
    try:
        found = deserialize(data)
    except SafetensorError as error:
        raise ModelError(f"these bytes are no safetensors: {error}") from error
    strange = [f"{name} is {tensor['dtype']}" for name, tensor in found if tensor["dtype"] not in _TYPES]
    if strange:
        raise ModelError(f"tensors of unknown types: {', '.join(strange[:4])}")
    return {
        name: np.frombuffer(tensor["data"], _TYPES[tensor["dtype"]]).reshape(tensor["shape"]) for name, tensor in found
    }
