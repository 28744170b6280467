"""Compute: layouts, one small file each: how the bytes lie that one layer stores.

A file says which types of the KV cache it ``SERVES``, as the setting ``kv_cache_dtype`` calls them, and ``make`` gives
its layout of what a layer stores. Types of few bits are rows of ``plan.grids.NARROW``; their scales are buffers of a
layout like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rootcellar.errors import ConfigError
from rootcellar.plan.stored import Form, Stored
from rootcellar.pools.layouts import heads, latents, narrow_heads, narrow_latents, routes, states
from rootcellar.pools.layouts.heads import PagedHeads
from rootcellar.pools.layouts.latents import PagedLatents
from rootcellar.pools.layouts.layout import Axes, Layout, TokenLayout, page_bytes
from rootcellar.pools.layouts.narrow_heads import NarrowHeads
from rootcellar.pools.layouts.narrow_latents import NarrowLatents
from rootcellar.pools.layouts.padded_latents import PaddedLatents
from rootcellar.pools.layouts.paired_heads import PairedHeads
from rootcellar.pools.layouts.routes import PagedRoutes
from rootcellar.pools.layouts.states import Slots

_FILES: tuple[tuple[Form, ModuleType], ...] = (
    ("heads", heads),
    ("heads", narrow_heads),
    ("latents", latents),
    ("latents", narrow_latents),
    ("states", states),
    ("routes", routes),
)
LAYOUTS: Mapping[tuple[Form, str], Callable[[Any, str, int], Layout]] = {
    (form, dtype): file.make for form, file in _FILES for dtype in file.SERVES
}


def layout_of(stored: Stored, kv_cache_dtype: str, page_size: int) -> Layout:
    """The layout of what a layer stores, in a KV cache of this dtype with pages of ``page_size`` tokens.

    Raises ``ConfigError`` for a dtype in which nobody lays out what is stored.
    """
    make = LAYOUTS.get((stored.form, kv_cache_dtype))
    if make is None:
        known = ", ".join(dtype for form, dtype in LAYOUTS if form == stored.form)
        raise ConfigError(f"kv_cache_dtype={kv_cache_dtype!r} has no layout of {stored.form}: choose from {known}")
    return make(stored, kv_cache_dtype, page_size)


def tiled(layout: Layout) -> Layout:
    """The layout of the same things in whole tiles of a TPU; of few bits as they are."""
    if isinstance(layout, PagedLatents):
        return PaddedLatents.instead(layout)
    return PairedHeads.instead(layout) if isinstance(layout, PagedHeads) else layout


__all__ = [
    "LAYOUTS",
    "Axes",
    "Layout",
    "NarrowHeads",
    "NarrowLatents",
    "PaddedLatents",
    "PagedHeads",
    "PagedLatents",
    "PagedRoutes",
    "PairedHeads",
    "Slots",
    "TokenLayout",
    "layout_of",
    "page_bytes",
    "tiled",
]
