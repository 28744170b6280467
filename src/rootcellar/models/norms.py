"""Root-mean-square norms (Zhang and Sennrich 2019)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rootcellar.models.spec import Init
from rootcellar.ops.panels import COLUMNS, Packed, packer
from rootcellar.ops.products import product


@dataclass(frozen=True)
class Norm:
    """A model's norm. ``offset`` is added to the weight: 1 where a checkpoint stores weights around zero (Gemma).

    ``fixed``: the sum is in one order, however many rows there are.
    """

    eps: float = 1e-6
    offset: float = 0.0
    fixed: bool = False

    @property
    def init(self) -> Init:
        """How its weights begin."""
        return "zeros" if self.offset else "ones"

    def __call__(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """``x`` normed over its last axis, float32 inside, in the dtype of ``x``."""
        if self.offset:  # as Gemma does it: the weight is applied before the result is narrowed
            wide = scaled(x, self.eps, fixed=self.fixed) * (weight.astype(jnp.float32) + self.offset)
            return wide.astype(x.dtype)
        return scaled(x, self.eps, fixed=self.fixed).astype(x.dtype) * weight.astype(x.dtype)


def scaled(x: jax.Array, eps: float, *, fixed: bool = False) -> jax.Array:
    """``x`` over its root mean square along the last axis, in float32: the norm without a weight."""
    wide = x.astype(jnp.float32)
    if fixed:
        mean = product(wide * wide, _ones(x.shape[-1]))[..., :1] / x.shape[-1]
    else:
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(mean + eps)


@functools.cache
def _ones(width: int) -> Packed:
    """What sums ``width`` inputs by the kernel of products, whose order can be fixed; XLA's follows the shape."""
    ones = np.ones((width, COLUMNS), np.float32)
    how = packer("float32", ones.shape, (0,))
    assert how is not None
    return how.packed(how.pack(ones), native=True, fixed=True)
