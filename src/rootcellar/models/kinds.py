"""A model's layers grouped into the cache's kinds."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from rootcellar.cache.kind import RULES, Kind
from rootcellar.models.model import ModelConfig
from rootcellar.pools import Layout

_NAMES = {"full": "full", "sliding_window": "window", "chunked_local": "chunk", "recurrent": "recurrent"}


def kinds_of(cfg: ModelConfig, dtype: jnp.dtype) -> tuple[tuple[Kind, ...], Mapping[str, Layout]]:
    """The kinds of a model and, by name, the layout of a layer of each; ``dtype`` is that of the KV cache.

    Layers of one rule, span and layout are one kind, named after its rule: full, window, chunk, recurrent. Where a rule
    has several, the second is named ``window-2`` and so on. Kinds are in the order of ``RULES``, then of their layers.
    """
    groups: dict[tuple[str, int, Layout], list[int]] = {}
    for index, layer in enumerate(cfg.layers):
        mixer = layer.mixer
        groups.setdefault((mixer.rule, mixer.span, mixer.layout(dtype)), []).append(index)
    kinds: list[Kind] = []
    layouts: dict[str, Layout] = {}
    for rule in RULES:
        of_rule = [(span, layout, layers) for (r, span, layout), layers in groups.items() if r == rule]
        for number, (span, layout, layers) in enumerate(of_rule, 1):
            name = _NAMES[rule] if number == 1 else f"{_NAMES[rule]}-{number}"
            kinds.append(Kind(name, tuple(layers), rule, span))
            layouts[name] = layout
    return tuple(kinds), layouts
