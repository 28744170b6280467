"""Which files of a folder are its weights."""

from __future__ import annotations

from pathlib import Path

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints.gguf_file import GgufTensors
from rootcellar.models.checkpoints.safetensors import INDEX, SINGLE, SafeTensors, safetensors_files
from rootcellar.models.files import find_file


def open_files(folder: Path) -> SafeTensors | GgufTensors:
    """The tensors of a folder: its safetensors, or where there are none its one ``.gguf``.

    Raises ``ModelError`` as these do, and for several ``.gguf``.
    """
    path = _gguf(folder)
    return SafeTensors(folder) if path is None else GgufTensors(path)


def has_weights(folder: str | Path) -> bool:
    """Whether there are weights in the folder."""
    folder = Path(folder)
    return _has_safetensors(folder) or _gguf(folder) is not None


def weight_files(folder: str | Path) -> list[Path]:
    """The files of a folder that are read, by name. Raises ``ModelError`` as ``open_files`` does."""
    folder = Path(folder)
    path = _gguf(folder)
    return safetensors_files(folder) if path is None else [path]


def _has_safetensors(folder: Path) -> bool:
    return any(find_file(folder, name) is not None for name in (SINGLE, INDEX))


def _gguf(folder: Path) -> Path | None:
    if not folder.is_dir() or _has_safetensors(folder):
        return None
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    if len(names) > 1:
        raise ModelError(f"{folder} has several GGUF files: {', '.join(names[:5])}; leave the one that is meant there")
    return find_file(folder, names[0]) if names else None
