"""Attention without a cache: the slow, obvious form that everything else is compared with, and that training uses."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rootcellar.models.decoder import Attend


def make_attend_dense(lengths: Sequence[int]) -> Attend:
    """Plain causal attention over packed rows: sequence ``i`` owns the next ``lengths[i]`` of the ``T`` tokens.

    The result fits ``decoder.forward``; ``sum(lengths)`` must be ``T``. Memory grows with the square of each length.
    Equal lengths run as one batch, others one after another.
    """

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        del layer  # every layer attends alike
        if sum(lengths) != q.shape[0]:
            raise ValueError(f"the lengths sum to {sum(lengths)}, but there are {q.shape[0]} tokens")
        if len(set(lengths)) == 1:
            batch = tuple(x.reshape(len(lengths), -1, *x.shape[1:]) for x in (q, k, v))
            return jax.vmap(causal_attention)(*batch).reshape(q.shape)
        ends = np.cumsum(lengths)[:-1]
        parts = zip(*(jnp.split(x, ends) for x in (q, k, v)), strict=True)
        return jnp.concatenate([causal_attention(*part) for part in parts])

    return attend


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One sequence's attention: q ``[T, H, D]``, k and v ``[T, K, D]`` -> ``[T, H, D]``; softmax in float32."""
    length, heads, dim = q.shape
    grouped = q.reshape(length, k.shape[1], -1, dim)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("kgts,skd->tkgd", weights, v).reshape(length, heads, dim)
