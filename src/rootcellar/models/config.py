"""Reading a model's ``config.json``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.checkpoints import format_of
from rootcellar.models.checkpoints.folder import has_weights
from rootcellar.models.families import family_of
from rootcellar.models.families.family import given, size
from rootcellar.models.files import hub_hint, read_json
from rootcellar.models.loader import has_own_head
from rootcellar.models.model import LayerConfig, ModelConfig
from rootcellar.models.norms import Norm
from rootcellar.plan.fields import LONGEST_CONTEXT, PROCESSOR, check_fields, text_of

__all__ = ["LayerConfig", "ModelConfig", "load_config", "read_config"]

log = logging.getLogger(__name__)


def load_config(folder: str | Path, *, weights: bool = True) -> ModelConfig:
    """Read ``config.json``, and ``generation_config.json`` where there is one, of a Hugging Face model folder.

    End-of-text ids are those of both files together, the nested ``text_config`` included: a checkpoint may name the end
    of a turn in any one of them. With ``weights``, those in the folder, where there are any, decide whether the head is
    tied to the embeddings: ``tie_word_embeddings`` says what was meant, not what was saved. Raises ``ModelError`` for a
    missing folder or file, an unknown architecture, a missing or absurd field, and for features that would silently
    give other results (a way to quantise weights that is not known).
    """
    folder = Path(folder)
    if not folder.is_dir():
        given = str(folder)
        raise ModelError(
            f"no model folder {given!r}: give a folder with config.json and *.safetensors in it{hub_hint(given)}"
        )
    raw = read_json(folder / "config.json")
    if raw is None:
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    generation = read_json(folder / "generation_config.json") or {}
    processor = read_json(folder / "preprocessor_config.json") or {}
    try:
        model = read_config(raw, generation, processor)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None
    if weights and model.tie_word_embeddings and has_weights(folder) and has_own_head(folder, model):
        log.warning(
            "%s has a head of its own, which is used although its config.json ties it to the embeddings", folder
        )
        model = replace(model, tie_word_embeddings=False)
    return model


def read_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, processor: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Turn the content of ``config.json`` (``generation_config.json``, ``preprocessor_config.json``) into a
    ``ModelConfig``.

    Understands the spelling of transformers before version 5 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and
    from 5 on (``rope_parameters``, ``dtype``). Raises ``ModelError`` as ``load_config`` does.
    """
    text = text_of(raw)
    check_fields(generation or {})
    check_fields(processor or {}, "preprocessor_config.json: ", PROCESSOR)
    family = family_of(raw)
    nested = raw.get("text_config") or {}  # a multimodal model's language model
    named = (each.get("eos_token_id") for each in (generation or {}, raw, nested))
    eos = {id for each in named for id in _ids(each)}
    raw = {**family.defaults, **text, "image_processor": processor}
    format_of(raw)  # refuses what would be read as something else
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
    model = ModelConfig(architecture=family.architecture, **{**common, **family.read(raw)})
    if model.context_length > LONGEST_CONTEXT:
        raise ModelError(
            f"max_position_embeddings={model.max_position_embeddings:,} and rope scaling make a context of "
            f"{model.context_length:,} tokens: more than {LONGEST_CONTEXT:,} are not supported"
        )
    return model


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids of a field that may hold one, several or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)
