"""Reading a model's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.families import family_of
from rootcellar.models.families.family import given, size
from rootcellar.models.model import LayerConfig, ModelConfig
from rootcellar.models.norms import Norm

__all__ = ["LayerConfig", "ModelConfig", "load_config", "read_config", "read_json"]


def load_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json``, and ``generation_config.json`` where there is one, of a Hugging Face model folder.

    End-of-text ids are those of both files together, the nested ``text_config`` included: a checkpoint may name the end
    of a turn in any one of them. Raises ``ModelError`` for a missing folder or file, an unknown architecture,
    a missing field, and for features that would silently give other results (quantised weights).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no model folder {str(folder)!r}: give a folder with config.json and *.safetensors in it")
    raw = read_json(folder / "config.json")
    if raw is None:
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    generation = read_json(folder / "generation_config.json") or {}
    try:
        return read_config(raw, generation)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Turn the content of ``config.json`` (and of ``generation_config.json``) into a ``ModelConfig``.

    Understands the spelling of transformers before version 5 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and
    from 5 on (``rope_parameters``, ``dtype``). Raises ``ModelError`` as ``load_config`` does.
    """
    family = family_of(raw)
    nested = raw.get("text_config") or {}  # a multimodal model's language model
    named = (each.get("eos_token_id") for each in (generation or {}, raw, nested))
    eos = {id for each in named for id in _ids(each)}
    raw = {**family.defaults, **raw, **nested}
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise ModelError(f"quantised weights ({method}) are not supported; use the float checkpoint of this model")
    common: dict[str, Any] = {
        "vocab_size": size(raw, "vocab_size"),
        "hidden_size": size(raw, "hidden_size"),
        "norm": Norm(float(given(raw, "rms_norm_eps", 1e-6))),
        "max_position_embeddings": size(raw, "max_position_embeddings"),
        "tie_word_embeddings": bool(given(raw, "tie_word_embeddings", False)),
        "eos_token_ids": tuple(sorted(eos)),
        "bos_token_id": next(iter(_ids(raw.get("bos_token_id"))), None),
        "dtype": str(given(raw, "dtype", given(raw, "torch_dtype", "float32"))).removeprefix("torch."),
    }
    return ModelConfig(architecture=family.architecture, **{**common, **family.read(raw)})


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids of a field that may hold one, several or none."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)
