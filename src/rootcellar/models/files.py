"""The files of a checkpoint, by name: what lies inside its folder, and is the file rather than a pointer to it.

A folder may come from a stranger. Names that lead out of it, in an index or through a symbolic link, are refused: what
lies elsewhere on the machine is nobody's weights or template. The one exception is the layout of the Hugging Face hub's
cache, whose ``snapshots/<revision>/`` is made of links into the ``blobs/`` beside it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from rootcellar.errors import ModelError

_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_TEXT = 64 * 2**20
"""Bytes. The largest in use, an index of a hundred thousand tensors, has a tenth."""


def hub_hint(name: str, *files: str) -> str:
    """What to run when ``name`` looks like a model's name on the Hugging Face hub; else nothing.

    ``files``: those that are needed; none means all.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return ""
    folder = name.rpartition("/")[2]
    fetch = " ".join(["hf download", name, *files, "--local-dir", folder])
    return f"; if it is a model of the Hugging Face hub, fetch it ('{fetch}') and give {folder!r}"


def find_file(folder: Path, name: str) -> Path | None:
    """The file ``name`` (a relative path) of a checkpoint; None when there is no such file.

    Raises ``ModelError`` when the name or a link leads out of the folder, and for a pointer of Git LFS.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name:
        raise ModelError(f"{folder} names the file {name[:200]!r}: only files inside the folder are read")
    path = folder / pure
    try:
        if not path.is_file():
            return None
        _check_place(folder, path)
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    if pointer:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file that it stands for: run 'git lfs pull' in {folder}"
        )
    return path


def _check_place(folder: Path, path: Path) -> None:
    real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append((home.parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{path} is a link to {real}, outside of the folder (and of a hub cache's blobs): copy the file there, or "
            "give the folder that holds it as model_path"
        )


def read_text(folder: Path, name: str) -> str | None:
    """The content of a text file of a checkpoint; None when there is no such file. ``ModelError`` as ``find_file``."""
    path = find_file(folder, name)
    if path is None:
        return None
    if path.stat().st_size > _LARGEST_TEXT:
        raise ModelError(f"{path} has {path.stat().st_size:,} bytes: more than {_LARGEST_TEXT:,} are not read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of the checkpoint ``path.parent``; None when there is no such file."""
    text = read_text(path.parent, path.name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not an object")
    return value
