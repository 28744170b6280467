"""The known architectures: a row each in ``FAMILIES``, a small file for each group of relatives."""

from __future__ import annotations

from collections.abc import Mapping

from rootcellar.errors import ModelError
from rootcellar.models.families import (
    bamba,
    deepseek,
    gemma,
    glm,
    gpt_oss,
    granite,
    llama,
    llama4,
    nemotron,
    olmo,
    qwen2_5_vl,
    qwen3_5,
    qwen3_next,
    qwen_moe,
)
from rootcellar.models.families.family import Family, Raw

_RELATIVES = (
    *(llama, gemma, gpt_oss, llama4, deepseek, bamba, qwen3_next, qwen_moe, olmo, glm, granite, nemotron),
    *(qwen2_5_vl, qwen3_5),
)
FAMILIES: Mapping[str, Family] = {
    family.architecture: family for relatives in _RELATIVES for family in relatives.FAMILIES
}


def family_of(raw: Raw) -> Family:
    """The family that ``config.json`` names under ``architectures``; ``ModelError`` lists the known ones."""
    named = raw.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise ModelError(f"unknown architecture {named or '(none given)'}; known: {', '.join(sorted(FAMILIES))}")
