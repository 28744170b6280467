"""What a layout is: the one place that knows how the bytes of a page lie in a layer's buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.plan.stored import Form

Axes = tuple[str | None, ...]
"""Logical axes of an array, from its first on; tensor parallelism may split those that are named."""


class Layout(Protocol):
    """How what one layer stores lies in its buffers. One frozen dataclass each, hashable; a file each.

    Page 0, the padding target, is among the pages.
    """

    @property
    def name(self) -> str:
        """What backends call it: one word for each order of bytes."""
        ...

    @property
    def form(self) -> Form:
        """What is stored."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens in a page; 1 where a page is the state of one request."""
        ...

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Of each array the logical axes."""
        ...

    @property
    def image(self) -> tuple[tuple[int, ...], ...]:
        """Of each array the axes of a page, counted without the pages' own, in the order that an image has them.

        What every layout of a form and a type must agree on, in the axes of ``unfolded``: keys and values by head are
        ``[2, kv_heads, page_size, head_dim]``, latents ``[page_size, dim]``, states as they are; scales
        come after, in the same order.
        """
        ...

    @property
    def unfolded(self) -> tuple[tuple[int, ...], ...]:
        """Of each array the shape of a page as an image knows it: the last axis cut in two where it holds two things
        side by side, and shorter where what is at its end is nothing.
        """  # fmt: skip
        ...

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of one layer's buffers, addressed by page in their first axis."""
        ...


class TokenLayout(Layout, Protocol):
    """A layout whose pages hold tokens: attention writes and reads them by these two functions, inside a compiled step.

    What is written and read are the parts of ``form``: keys and values ``[..., kv_heads, head_dim]`` for heads, one
    vector ``[..., D]`` for latents. On each device of a mesh ``buffers`` and parts are the device's own.
    """

    @property
    def turn(self) -> NDArray[np.float32] | None:
        """A symmetric orthogonal matrix ``[D, D]`` by which what is read was multiplied as it was written, as queries
        must be before they attend, and what they give after; None: none.
        """  # fmt: skip
        ...

    def write(
        self, buffers: Sequence[Array], pages: Array, offsets: Array, parts: Sequence[Array]
    ) -> tuple[Array, ...]:
        """``buffers`` with the ``parts`` [N, ...] of tokens at ``offsets`` [N] of ``pages`` [N]."""
        ...

    def read(self, buffers: Sequence[Array], pages: Array) -> tuple[Array, ...]:
        """The float32 parts of all tokens of ``pages`` [...]: ``[..., kv_heads, page_size, head_dim]`` for heads, and
        ``[..., page_size, D]`` for latents.
        """  # fmt: skip
        ...


def as_it_lies(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """``unfolded`` of a layout whose arrays hold one thing each."""
    return tuple(array.shape[1:] for array in layout.buffers(1))


def page_bytes(layout: Layout) -> int:
    """Bytes of one page in one layer, over all devices that share its heads."""
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in layout.buffers(1))
