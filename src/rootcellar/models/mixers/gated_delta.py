"""Gated delta net (Yang, Kautz and Hatamizadeh, 2024): linear attention that overwrites, as Qwen3-Next and Qwen3.5 have
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.forward_batch import ForwardBatch
from rootcellar.models.mixers.recurrent import Recurrent
from rootcellar.models.norms import scaled
from rootcellar.models.packing import Views
from rootcellar.models.spec import Declare, Params
from rootcellar.ops.delta import gated_delta, gated_delta_sequential
from rootcellar.ops.products import product
from rootcellar.ops.recurrent import causal_conv, causal_conv_sequential, course
from rootcellar.plan.stored import States


@dataclass(frozen=True)
class GatedDelta(Recurrent):
    """One layer of ``heads`` value heads, each with a state ``[key_dim, value_dim]``.

    Value head ``h`` uses the query and the key of head ``h // (heads // key_heads)``.

    Attributes:
        taps: of the convolution that queries, keys and values go through first.
        eps: of the norm of each head's output.
        apart: checkpoints store queries, keys and values of all heads one after the other, and gates, rates and decays
            each in a tensor of their own (Qwen3.5); else what belongs to a key head lies together.
    """

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    taps: int
    eps: float
    apart: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise ModelError(
                f"linear_num_value_heads={self.heads} is no multiple of linear_num_key_heads={self.key_heads}"
            )

    @property
    def widths(self) -> tuple[int, int, int]:
        """See ``Mixer``."""
        return self.heads, self.heads, max(self.key_dim, self.value_dim)

    @property
    def stored(self) -> States:
        """See ``Mixer``."""
        return States((self.taps - 1, self.channels), (self.heads, self.key_dim, self.value_dim))

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def _per_key(self) -> int:
        return self.heads // self.key_heads

    def declare(self, declare: Declare, embed: int) -> Params:
        """``delta_in`` [E, Q, 2 K + 2 R V], for each key head its query, key, values and gates; ``delta_rates``
        [E, Q, 2 R], its values' rates and decays; ``delta_out``; small ones. R: value heads of a key head.
        """  # fmt: skip
        by_key = self._per_key
        wide = 2 * self.key_dim + 2 * by_key * self.value_dim
        inner, linear = self.heads * self.value_dim, packing.transposed
        into, rates = linear, linear
        if self.apart:
            keys = self.key_dim
            into = partial(_parts, at=(keys, 2 * keys, 2 * keys + by_key * self.value_dim))
            rates = partial(_parts, at=(by_key,))
        return {
            "delta_in": declare("delta_in", (embed, self.key_heads, wide), ("embed", None, None), "random", into, (0,)),
            "delta_rates": declare(
                "delta_rates", (embed, self.key_heads, 2 * by_key), ("embed", None, None), "random", rates
            ),
            "delta_conv": declare("delta_conv", (self.taps, self.channels), (None, None), "random", packing.depthwise),
            "delta_dt_bias": replace(declare("delta_dt_bias", (self.heads,), (None,), "ones"), wide=True),
            "delta_a_log": replace(declare("delta_a_log", (self.heads,), (None,), "ones"), wide=True),
            "delta_norm": declare("delta_norm", (self.value_dim,), (None,), "ones"),
            "delta_out": declare("delta_out", (inner, embed), (None, "embed"), "random", linear, (0,)),
        }

    def run(
        self, params: Params, x: jax.Array, batch: ForwardBatch, buffers: Sequence[jax.Array]
    ) -> tuple[jax.Array, Sequence[jax.Array]]:
        """See ``Mixer``."""
        way = course(batch.table, batch.rows, batch.positions)
        mixed, gate, rates = self._project(params, x)
        mixed, conv = causal_conv(buffers[0], mixed, params["delta_conv"], None, way, self.conv_in_place(batch))
        y, state = gated_delta(buffers[1], *self._split(mixed), *rates, way, self.in_place(batch))
        return self._merge(params, y, gate), [conv, state]

    def plain(self, params: Params, x: jax.Array) -> jax.Array:
        """See ``Mixer``: token after token."""
        mixed, gate, rates = self._project(params, x)
        mixed = causal_conv_sequential(mixed, params["delta_conv"], None)
        start = jnp.zeros((self.heads, self.key_dim, self.value_dim))
        y, _ = gated_delta_sequential(start, *self._split(mixed), *rates)
        return self._merge(params, y, gate)

    def _project(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """The convolution's inputs ``[T, channels]``, gates ``[T, H, V]``; decays and rates, float32 ``[T, H]``."""
        tokens, keys, values = len(x), self.key_dim, self._per_key * self.value_dim
        wide = product(x, params["delta_in"])
        parts = jnp.split(wide, (keys, 2 * keys, 2 * keys + values), axis=-1)
        mixed = jnp.concatenate([part.reshape(tokens, -1) for part in parts[:3]], axis=-1)
        rates = jnp.einsum("te,ekr->tkr", x, params["delta_rates"]).astype(jnp.float32)
        beta, dt = (part.reshape(tokens, -1) for part in jnp.split(rates, 2, axis=-1))
        dt = jax.nn.softplus(dt + params["delta_dt_bias"].astype(jnp.float32))
        decay = -jnp.exp(params["delta_a_log"].astype(jnp.float32)) * dt
        return mixed, parts[3].reshape(tokens, self.heads, -1), (decay, jax.nn.sigmoid(beta))

    def _split(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the convolution gave, through its activation: queries and keys ``[T, Q, K]``, values ``[T, H, V]``."""
        keys = self.key_heads * self.key_dim
        q, k, v = jnp.split(jax.nn.silu(mixed), (keys, 2 * keys), axis=-1)
        by_key = (-1, self.key_heads, self.key_dim)
        return q.reshape(by_key), k.reshape(by_key), v.reshape(-1, self.heads, self.value_dim)

    def _merge(self, params: Params, y: jax.Array, gate: jax.Array) -> jax.Array:
        """``[T, E]`` of the heads' outputs ``[T, H, V]``, normed and then gated."""
        y = scaled(y, self.eps) * params["delta_norm"].astype(jnp.float32)
        y = (y * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)
        return product(y.reshape(len(y), -1), params["delta_out"])


def _parts(packed: NDArray[Any], at: tuple[int, ...]) -> Views:
    """``[E, heads, outputs]``, whose outputs are several linear layers: the first of all heads, then the second, ..."""
    ends = (0, *at, packed.shape[-1])
    return [packing.linear(packed[..., start:end], 1) for start, end in itertools.pairwise(ends)]
