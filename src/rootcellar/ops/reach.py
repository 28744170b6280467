"""What a query of attention sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax


@dataclass(frozen=True)
class Reach:
    """What a query sees, and the ``scale`` of its scores. ``rule`` and ``span`` (tokens) as in the cache's ``Kind``.

    ``softcap``: scores are squashed to within it by tanh (Gemma 2); 0: they are not.
    """

    rule: Literal["full", "sliding_window", "chunked_local"] = "full"
    span: int = 0
    scale: float = 1.0
    softcap: float = 0.0

    def first(self, query: Array) -> Array:
        """The first position that queries at positions ``query`` (int32, any shape) see."""
        if self.rule == "sliding_window":
            return jnp.maximum(query - (self.span - 1), 0)
        if self.rule == "chunked_local":
            # Not `//`, for whose signs Pallas asks which TPU this is.
            return lax.div(jnp.maximum(query, 0), jnp.full_like(query, self.span)) * self.span
        return jnp.zeros_like(query)

    def capped(self, scores: Array) -> Array:
        """``scores``, already scaled, of any shape, as they enter the softmax."""
        return scores if not self.softcap else jnp.tanh(scores / self.softcap) * self.softcap

    def sees(self, query: Array, key: Array) -> Array:
        """Whether positions ``query`` see positions ``key``; bool, the two broadcast together."""
        return (key <= query) & (key >= self.first(query))
