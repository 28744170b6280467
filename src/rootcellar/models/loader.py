"""Weights between checkpoints and params pytrees."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints import format_of
from rootcellar.models.checkpoints.coded import Coded
from rootcellar.models.checkpoints.folder import open_files
from rootcellar.models.checkpoints.safetensors import SINGLE
from rootcellar.models.families import FAMILIES
from rootcellar.models.files import read_json
from rootcellar.models.model import ModelConfig
from rootcellar.models.packing import SourceTensor, pack, sources_of, unpack
from rootcellar.models.params import check_params, declare
from rootcellar.models.spec import Hold, Params, ParamSpec

logger = logging.getLogger(__name__)

FLOATS = {"BF16", "F16", "F32", "F64"}
_COMPARED = 2**22  # elements of embeddings and head in memory at a time
_KV_SCALES = (".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale")


def load_params(
    folder: str | Path,
    cfg: ModelConfig,
    dtype: Any,
    hold: Hold = lambda _, array: jax.device_put(array),
    advance: Callable[[int], None] = lambda _: None,
) -> Params:
    """The params pytree of ``cfg``, in ``dtype``, from a checkpoint's folder; ``hold`` puts each on the device.

    Tensors are read a part at a time, expanded where the checkpoint holds them in fewer bits (``checkpoints``), and
    parameters packed and placed one after another: beyond the result, memory holds at most one parameter and the part
    of a tensor. ``advance`` is told the bytes of each parameter that is done. Raises ``ModelError`` naming the tensor
    and its file when one is missing, misshapen, or neither floats nor what the checkpoint's format says. Unused tensors
    are logged, but for those that say nothing new (a tied head, stored rotary frequencies).
    """
    checkpoint, specs = _checked(Path(folder), cfg)
    if cfg.tie_word_embeddings and checkpoint.differ(*_embed_and_head(cfg)):
        raise ModelError(f"{folder} has a head of its own, but the config given ties it: take load_config(folder)")
    checkpoint.report_unused(jax.tree.leaves(specs))

    def load(path: tuple[Any, ...], spec: ParamSpec) -> Any:
        packed = pack(spec, checkpoint.readers(spec), dtype)
        held, size = hold(path, packed), packed.nbytes
        advance(size)
        return held

    params: Params = jax.tree_util.tree_map_with_path(load, specs)
    return params


def check_weights(folder: str | Path, cfg: ModelConfig) -> None:
    """Raise ``ModelError`` as ``load_params`` would for what is missing, misshapen or no float; reads headers only."""
    _checked(Path(folder), cfg)


def _checked(folder: Path, cfg: ModelConfig) -> tuple[_Checkpoint, Params]:
    checkpoint, specs = _Checkpoint(folder), declare(cfg)
    if cfg.tie_word_embeddings:
        embed, head = _embed_and_head(cfg)
        checkpoint.stand_in(embed, head)
    for spec in jax.tree.leaves(specs):
        checkpoint.check(spec)
    return checkpoint, specs


def has_own_head(folder: str | Path, cfg: ModelConfig) -> bool:
    """Whether a checkpoint holds a head that is not its embeddings, whatever ``tie_word_embeddings`` says.

    As in transformers from 5 on, what was saved decides: a head that equals the embeddings is tied, another is used.
    Reads both, a part at a time, up to the first difference.
    """
    embed, head = _embed_and_head(cfg)
    return _Checkpoint(Path(folder)).differ(embed, head)


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
        readers = [partial(_rows, lambda rows, tensor=tensors[each.name]: tensor[rows], each) for each in sources]
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


def _rows(read: Callable[[slice], Any], source: SourceTensor, rows: slice) -> NDArray[Any]:
    """Rows of a source, which may be rows of a tensor itself."""
    first = 0 if source.rows is None else source.rows.start
    return np.asarray(read(slice(first + rows.start, first + rows.stop)))


class _Checkpoint:
    """What a folder holds: each tensor of a family by its name, however it is stored."""

    def __init__(self, folder: Path):
        self._files = open_files(folder)
        self._format = format_of(read_json(folder / "config.json") or {})
        self._found: dict[str, Coded | None] = {}

    def _find(self, name: str) -> Coded | None:
        if name not in self._found:
            self._found[name] = self._format(self._files, name) or self._saved(name)
        return self._found[name]

    def _saved(self, name: str) -> Coded | None:
        """A tensor that is stored as itself."""
        files = self._files
        if name not in files:
            return None
        if files.dtype(name) not in FLOATS:
            raise ModelError(
                f"tensor {name!r} in {files.place(name)} is {files.dtype(name)}; "
                f"only {', '.join(sorted(FLOATS))} are supported"
            )
        return Coded((name,), files.shape(name), partial(files.read, name))

    def stand_in(self, name: str, other: str) -> None:
        """Where tensor ``name`` is missing, let ``other`` be it."""
        if self._find(name) is None:
            self._found[name] = self._find(other)

    def differ(self, name: str, other: str) -> bool:
        """Whether both tensors are there and hold other values."""
        if any(each in self._files and self._files.dtype(each) not in FLOATS for each in (name, other)):
            return name in self._files and other in self._files
        one, two = self._find(name), self._find(other)
        if one is None or two is None:
            return False
        if one.shape != two.shape:
            return True
        rows = max(1, _COMPARED // max(1, *one.shape[1:]))
        parts = [slice(at, min(at + rows, one.shape[0])) for at in range(0, one.shape[0], rows)]
        return not all(np.array_equal(one.read(p).astype(np.float64), two.read(p).astype(np.float64)) for p in parts)

    def check(self, spec: ParamSpec) -> None:
        """Raise ``ModelError`` unless each source is there, with its shape, as floats; reads headers only."""
        for source in sources_of(spec):
            name, shape, found = source.name, source.shape, self._find(source.name)
            if found is None:
                hint = " (is tie_word_embeddings true for this model?)" if name == "lm_head.weight" else ""
                listed = self._files.folder / self._files.listed
                raise ModelError(f"tensor {name!r} {list(shape)} is missing from {listed}{hint}")
            if found.shape != shape:
                raise ModelError(
                    f"tensor {name!r} in {self._files.place(found.parts[0])} has shape {list(found.shape)}, "
                    f"but config.json asks for {list(shape)}"
                )

    def readers(self, spec: ParamSpec) -> list[Callable[[slice], NDArray[Any]]]:
        """Functions that read rows of the sources of ``spec``, in order."""
        found = [(source, self._find(source.name)) for source in sources_of(spec)]
        return [partial(_rows, coded.read, source) for source, coded in found if coded is not None]

    def report_unused(self, specs: list[ParamSpec]) -> None:
        """Log the tensors that no parameter is made from: a sign of a config that does not fit."""
        found = [self._find(name) for spec in specs for name in spec.sources]
        used = {part for coded in found if coded is not None for part in coded.parts}
        silent = ("lm_head.weight", "rotary_emb.inv_freq")
        unused = [name for name in self._files.names() if name not in used and not name.endswith(silent)]
        scales = [name for name in unused if name.endswith(_KV_SCALES)]
        if scales:
            logger.warning(
                "%d scales of KV in %s (%s, ...) are not used: pages of few bits have their own, which err less",
                len(scales), self._files.folder, scales[0],
            )  # fmt: skip
        unused = [name for name in unused if name not in scales]
        if unused:
            shown = ", ".join(unused[:5]) + (", …" if len(unused) > 5 else "")
            logger.warning("%d tensors in %s are not used: %s", len(unused), self._files.folder, shown)
