"""Mixing without a cache: the slow, obvious form that everything else is compared with, and that training uses."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rootcellar.models.decoder import Mix
from rootcellar.models.model import ModelConfig
from rootcellar.models.spec import Params


def make_mix_dense(cfg: ModelConfig, lengths: Sequence[int]) -> Mix:
    """Plain mixing over packed rows: sequence ``i``, whole, owns the next ``lengths[i]`` of the ``T`` tokens.

    The result fits ``decoder.forward``; ``sum(lengths)`` must be ``T``. Memory grows with the square of each length.
    Equal lengths run as one batch, others one after another.
    """

    def mix(layer: int, params: Params, x: jax.Array) -> jax.Array:
        if sum(lengths) != x.shape[0]:
            raise ValueError(f"the lengths sum to {sum(lengths)}, but there are {x.shape[0]} tokens")
        plain = cfg.layers[layer].mixer.plain
        if len(set(lengths)) == 1:
            rows = x.reshape(len(lengths), -1, x.shape[-1])
            return jax.vmap(plain, in_axes=(None, 0))(params, rows).reshape(x.shape)
        return jnp.concatenate([plain(params, part) for part in jnp.split(x, np.cumsum(lengths)[:-1])])

    return mix
