"""Compute: attention backends, one small file each.

A packed batch is a flat list of tokens, cut into *tiles* of equally many consecutive positions of one row, padding
(position -1) last; decoding is the case of one token a tile. A backend writes what is new into the pages and attends to
each row's. A file says of a layout whether it ``lacks`` anything to attend over it, and ``attend`` gives the function,
which takes and gives back a layer's buffers. The caller donates them: a step never copies the pool.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rootcellar.errors import ConfigError
from rootcellar.ops.backends import fixed, gpu, native, tpu, xla
from rootcellar.ops.backends.backend import Attend, Backend
from rootcellar.ops.reach import Reach
from rootcellar.pools import Layout
from rootcellar.pools.layouts import TokenLayout

# Those that are tried first come first. No GPU has run the kernel for GPUs yet: it is taken by name alone.
BACKENDS: Mapping[str, Backend] = {"native": native, "tpu": tpu, "xla": xla, "gpu": gpu}
INTERPRETED = ("tpu", "gpu")
"""Those that compute on a CPU only as tests have it, slowly."""
FIXED = "fixed"
"""What runs in the place of ``native`` where answers must not depend on the batch."""


def choose_backend(wanted: str, layouts: Collection[Layout], platform: str) -> str:
    """Which backend runs, by name: the first that can attend over all of ``layouts``, or the one that is ``wanted``.

    Args:
        wanted: the setting ``attention_backend``: ``"auto"`` or a backend's name.
        layouts: of all layers that attend, before :func:`preferred`.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    Raises:
        ConfigError: the wanted one, or every one, lacks something; the message says what.
    """
    for name in BACKENDS if wanted == "auto" else (wanted,):
        preferred_ones = (preferred(name, layout, platform) for layout in layouts)
        lacks = [why for layout in preferred_ones if (why := BACKENDS[name].lacks(layout, platform)) is not None]
        if not lacks:
            return name
    others = " or ".join(repr(other) for other in ("auto", *BACKENDS) if other != wanted)
    raise ConfigError(f"attention_backend={wanted!r} cannot be used: {lacks[0]}. Use attention_backend={others}.")


def preferred(backend: str, layout: Layout, platform: str) -> Layout:
    """The layout that stands in the place of ``layout`` where this backend runs."""
    return layout if backend == FIXED else BACKENDS[backend].prefers(layout, platform)


def attention(backend: str, layout: TokenLayout, reach: Reach) -> Attend:
    """The attention function of a backend over pages of ``layout``, for queries that see what ``reach`` says."""
    return (fixed if backend == FIXED else BACKENDS[backend]).attend(layout, reach)


__all__ = ["BACKENDS", "FIXED", "INTERPRETED", "Attend", "Backend", "Reach", "attention", "choose_backend", "preferred"]
