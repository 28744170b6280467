"""What an attention backend is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jax import Array

from rootcellar.ops.reach import Reach
from rootcellar.pools import Layout
from rootcellar.pools.layouts import TokenLayout

Attend = Callable[..., tuple[Array, ...]]
"""Attention over the pages of one layer, inside a compiled step: ``attend(q, *parts, [sinks,] tables, rows, positions,
*buffers) -> (out, *buffers)``.

``buffers`` are the layout's; ``parts`` what it stores of each token. Over heads: ``q [T, heads, head_dim]``, keys and
values ``[T, kv_heads, head_dim]``, and float32 ``sinks [heads]`` (scores that take weight and give nothing; minus
infinity for none). Over latents: ``q [T, heads, D]``, absorbed and scaled, and latents ``[T, D]``; there are no sinks.

Int32 ``tables [R, W]`` (page of each run of ``page_size`` positions; those that no query sees may be 0), ``rows
[tiles]`` (the table row of each tile) and ``positions [T]`` (-1 for padding); ``T`` is a multiple of ``tiles``. ``out``
is float32 in the shape of ``q`` (over latents sums of latents); rows of padding hold nothing of meaning.
"""


class Backend(Protocol):
    """A file of this folder."""

    def prefers(self, layout: Layout, platform: str) -> Layout:
        """The layout, of the same things in as many bytes, over which it would rather attend there; else ``layout``."""
        ...

    def lacks(self, layout: Layout, platform: str) -> str | None:
        """Why it cannot attend over pages of ``layout`` on ``platform``, for a message; None: it can."""
        ...

    def attend(self, layout: TokenLayout, reach: Reach) -> Attend:
        """The attention function over pages of a layout for which it lacks nothing."""
        ...
