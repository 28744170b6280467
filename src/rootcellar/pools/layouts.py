"""Layouts: how the bytes that one layer stores lie in its buffers. One class each.

A layout says which arrays a layer has for so many pages (``arrays``). Page 0, the padding target, is among the pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp


class Layout(Protocol):
    """What a pool needs of a layout; ``dtype`` is that of the KV cache."""

    dtype: jnp.dtype

    def arrays(self, pages: int, page_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of one layer's buffers, addressed by page in their first axis."""
        ...

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """For each buffer the logical axes that tensor parallelism may split; what is not named is whole everywhere."""
        ...


@dataclass(frozen=True)
class PagedKV:
    """K and V of ``kv_heads`` heads, page-major, K apart from V inside the page (MHA, GQA).

    A page is ``[2, kv_heads, page_size, head_dim]``: what a CPU reads fastest (interleaving K and V by head was
    measured four to five times slower there).
    """

    kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    def shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        """The buffer of one layer: ``[pages, 2, kv_heads, page_size, head_dim]``."""
        return (pages, 2, self.kv_heads, page_size, self.head_dim)

    def arrays(self, pages: int, page_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One buffer, of :meth:`shape`."""
        return (jax.ShapeDtypeStruct(self.shape(pages, page_size), self.dtype),)

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """Each device holds its own KV heads."""
        return ((None, None, "kv_heads"),)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class PagedLatent:
    """Multi-head latent attention (DeepSeek-V2): the compressed KV of all heads, then the rotated part of the key."""

    kv_lora_rank: int
    rope_dim: int
    dtype: jnp.dtype

    def arrays(self, pages: int, page_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One buffer ``[pages, page_size, kv_lora_rank + rope_dim]``."""
        return (jax.ShapeDtypeStruct((pages, page_size, self.kv_lora_rank + self.rope_dim), self.dtype),)

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """Every device needs the whole latent."""
        return ((),)


@dataclass(frozen=True)
class States:
    """Recurrent layers (Mamba, gated delta): a page is the state of one request, whatever ``page_size``.

    ``conv``: shape of the convolution's last inputs, in ``dtype``; ``state``: of the recurrent state, which accumulates
    over the whole sequence and so stays float32.
    """

    conv: tuple[int, ...]
    state: tuple[int, ...]
    dtype: jnp.dtype

    def arrays(self, pages: int, page_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:  # noqa: ARG002 - see above
        """Two buffers, ``[pages, *conv]`` and ``[pages, *state]``."""
        return (
            jax.ShapeDtypeStruct((pages, *self.conv), self.dtype),
            jax.ShapeDtypeStruct((pages, *self.state), jnp.float32),
        )

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """States are whole on every device."""
        return ((), ())
