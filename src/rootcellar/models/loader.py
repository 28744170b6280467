"""Weights between Hugging Face folders (single or sharded safetensors) and params pytrees."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rootcellar.errors import ModelError
from rootcellar.models.families import FAMILIES
from rootcellar.models.files import find_file, read_json
from rootcellar.models.model import ModelConfig
from rootcellar.models.packing import SourceTensor, pack, sources_of, unpack
from rootcellar.models.params import check_params, declare
from rootcellar.models.spec import Params, ParamSpec

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"BF16", "F16", "F32", "F64"}
_COMPARED = 2**22  # elements of embeddings and head in memory at a time


def load_params(
    folder: str | Path,
    cfg: ModelConfig,
    dtype: Any,
    hold: Callable[[ParamSpec, NDArray[Any]], Any] = lambda _, array: jax.device_put(array),
) -> Params:
    """The params pytree of ``cfg``, in ``dtype``, from a folder's safetensors; ``hold`` puts each on the device.

    Reads ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names. Parameters are read, packed
    and placed one at a time: beyond the result, memory holds at most one parameter. Raises ``ModelError`` naming the
    tensor and its file when one is missing, misshapen or not of a float dtype. Unused tensors are logged, but for
    those that say nothing new (a tied head, stored rotary frequencies).
    """
    with ExitStack() as files:
        checkpoint, specs = _checked(Path(folder), cfg, files)
        if cfg.tie_word_embeddings and checkpoint.differ(*_embed_and_head(cfg)):
            raise ModelError(f"{folder} has a head of its own, but the config given ties it: take load_config(folder)")
        checkpoint.report_unused(jax.tree.leaves(specs))
        params: Params = jax.tree.map(lambda spec: hold(spec, pack(spec, checkpoint.readers(spec), dtype)), specs)
        return params


def check_weights(folder: str | Path, cfg: ModelConfig) -> None:
    """Raise ``ModelError`` as ``load_params`` would for what is missing, misshapen or no float; reads headers only."""
    with ExitStack() as files:
        _checked(Path(folder), cfg, files)


def _checked(folder: Path, cfg: ModelConfig, files: ExitStack) -> tuple[_Checkpoint, Params]:
    checkpoint, specs = _Checkpoint(folder, files), declare(cfg)
    if cfg.tie_word_embeddings:
        embed, head = _embed_and_head(cfg)
        checkpoint.stand_in(embed, head)
    for spec in jax.tree.leaves(specs):
        checkpoint.check(spec)
    return checkpoint, specs


def has_weights(folder: str | Path) -> bool:
    """Whether there are weights in the folder that ``load_params`` would read."""
    return any(find_file(Path(folder), name) is not None for name in (SINGLE, INDEX))


def has_own_head(folder: str | Path, cfg: ModelConfig) -> bool:
    """Whether a checkpoint holds a head that is not its embeddings, whatever ``tie_word_embeddings`` says.

    As in transformers from 5 on, what was saved decides: a head that equals the embeddings is tied, another is used.
    Reads both, a part at a time, up to the first difference.
    """
    embed, head = _embed_and_head(cfg)
    with ExitStack() as files:
        checkpoint = _Checkpoint(Path(folder), files)
        return checkpoint.differ(embed, head)


def _embed_and_head(cfg: ModelConfig) -> tuple[str, str]:
    """The names of the two tensors in checkpoints of the family."""
    names = FAMILIES[cfg.architecture].names
    return names["embed"][0], names["head"][0]


def params_from_tensors(cfg: ModelConfig, tensors: Mapping[str, NDArray[Any]], dtype: Any) -> Params:
    """The params pytree from tensors already in memory, under the names that the checkpoint's family uses.

    ``ModelError`` names a tensor that is missing or misshapen.
    """

    def load(spec: ParamSpec) -> Any:
        sources = sources_of(spec)
        for source in sources:
            name, shape = source.name, source.shape
            if name not in tensors:
                raise ModelError(f"tensor {name!r} {list(shape)} is missing")
            if tensors[name].shape != shape:
                raise ModelError(f"tensor {name!r} has shape {list(tensors[name].shape)}, not {list(shape)}")
        readers = [partial(_rows, tensors[source.name], source.rows) for source in sources]
        return jax.device_put(pack(spec, readers, dtype))

    params: Params = jax.tree.map(load, declare(cfg))
    return params


def tensors_from_params(cfg: ModelConfig, params: Params) -> Iterator[tuple[str, NDArray[Any]]]:
    """The checkpoint's tensors, one after another with their names: the inverse of ``params_from_tensors``."""
    check_params(cfg, params)
    for spec, array in zip(jax.tree.leaves(declare(cfg)), jax.tree.leaves(params), strict=True):
        yield from unpack(spec, np.asarray(array))


def save_params(folder: str | Path, cfg: ModelConfig, params: Params) -> None:
    """Write ``model.safetensors`` (one file, the params' dtype) into an existing folder; the config is the caller's."""
    save_file(dict(tensors_from_params(cfg, params)), Path(folder) / SINGLE, metadata={"format": "pt"})


def _rows(tensor: Any, rows: slice | None) -> NDArray[Any]:
    return np.asarray(tensor if rows is None else tensor[rows])


class _Checkpoint:
    """The open safetensors files of one folder, and which tensor lies in which."""

    def __init__(self, folder: Path, files: ExitStack):
        self._folder = folder
        self._where = _tensor_files(folder)
        self._stored: dict[str, str] = {}
        self._files = {name: files.enter_context(_open(folder, name)) for name in sorted(set(self._where.values()))}
        if not self._where:  # no index: the one file's own header is the list
            self._files = {SINGLE: files.enter_context(_open(folder, SINGLE))}
            self._where = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
        self._held = {name: set(file.keys()) for name, file in self._files.items()}

    def stand_in(self, name: str, other: str) -> None:
        """Where tensor ``name`` is missing, let ``other`` be it."""
        if name not in self._where and other in self._where:
            self._stored[name] = other
            self._where[name] = self._where[other]

    def differ(self, name: str, other: str) -> bool:
        """Whether both tensors are there and hold other values."""
        if any(each not in self._held.get(self._where.get(each, ""), ()) for each in (name, other)):
            return False
        one, two = (self._files[self._where[each]].get_slice(each) for each in (name, other))
        shape = one.get_shape()
        if shape != two.get_shape() or not {one.get_dtype(), two.get_dtype()} <= FLOATS:
            return True
        rows = max(1, _COMPARED // max(1, *shape[1:]))
        parts = [slice(at, min(at + rows, shape[0])) for at in range(0, shape[0], rows)]
        return not all(np.array_equal(one[part].astype(np.float64), two[part].astype(np.float64)) for part in parts)

    def check(self, spec: ParamSpec) -> None:
        """Raise ``ModelError`` unless each source is there, with its shape, as floats; reads headers only."""
        for source in sources_of(spec):
            name, shape = source.name, source.shape
            file = self._where.get(name)
            if file is None:
                listed = SINGLE if set(self._files) == {SINGLE} else INDEX
                hint = " (is tie_word_embeddings true for this model?)" if name == "lm_head.weight" else ""
                raise ModelError(f"tensor {name!r} {list(shape)} is missing from {self._folder / listed}{hint}")
            stored = self._stored.get(name, name)
            if stored not in self._held[file]:
                raise ModelError(f"tensor {name!r} should be in {self._folder / file}, says {INDEX}, but is not there")
            header = self._files[file].get_slice(stored)
            if tuple(header.get_shape()) != shape:
                raise ModelError(
                    f"tensor {name!r} in {self._folder / file} has shape {header.get_shape()}, "
                    f"but config.json asks for {list(shape)}"
                )
            if header.get_dtype() not in FLOATS:
                raise ModelError(
                    f"tensor {name!r} in {self._folder / file} is {header.get_dtype()}; "
                    f"only {', '.join(sorted(FLOATS))} are supported"
                )

    def readers(self, spec: ParamSpec) -> list[Callable[[], NDArray[Any]]]:
        """Functions that read the sources of ``spec``, in order."""
        return [partial(self._read, source) for source in sources_of(spec)]

    def _read(self, source: SourceTensor) -> NDArray[Any]:
        file, stored = self._files[self._where[source.name]], self._stored.get(source.name, source.name)
        tensor: NDArray[Any] = file.get_tensor(stored) if source.rows is None else file.get_slice(stored)[source.rows]
        return tensor

    def report_unused(self, specs: list[ParamSpec]) -> None:
        """Log the tensors that no parameter is made from: a sign of a config that does not fit."""
        used = {name for spec in specs for name in spec.sources}
        silent = ("lm_head.weight", "rotary_emb.inv_freq")
        unused = sorted(name for name in self._where if name not in used and not name.endswith(silent))
        if unused:
            shown = ", ".join(unused[:5]) + (", …" if len(unused) > 5 else "")
            logger.warning("%d tensors in %s are not used: %s", len(unused), self._folder, shown)


def weight_files(folder: str | Path) -> list[Path]:
    """The files that :func:`load_params` would read of a folder, by name. Raises ``ModelError`` as it does."""
    folder = Path(folder)
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
            f"no weights in {folder}: looked for {SINGLE} and {INDEX}, found {found or 'no weight file'}; "
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


def _open(folder: Path, name: str) -> Any:
    path = _path(folder, name)
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None
