"""Root-mean-square norms (Zhang and Sennrich 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rootcellar.models.spec import Init


@dataclass(frozen=True)
class Norm:
    """A model's norm. ``offset`` is added to the weight: 1 where a checkpoint stores weights around zero (Gemma)."""

    eps: float = 1e-6
    offset: float = 0.0

    @property
    def init(self) -> Init:
        """How its weights begin."""
        return "zeros" if self.offset else "ones"

    def __call__(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """``x`` normed over its last axis, float32 inside, in the dtype of ``x``."""
        if self.offset:  # as Gemma does it: the weight is applied before the result is narrowed
            return (scaled(x, self.eps) * (weight.astype(jnp.float32) + self.offset)).astype(x.dtype)
        return scaled(x, self.eps).astype(x.dtype) * weight.astype(x.dtype)


def scaled(x: jax.Array, eps: float) -> jax.Array:
    """``x`` over its root mean square along the last axis, in float32: the norm without a weight."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
