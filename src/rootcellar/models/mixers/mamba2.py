"""Mamba-2 (Dao and Gu, 2024): a state space layer in the place of attention, as Bamba and Granite 4 have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.forward_batch import ForwardBatch
from rootcellar.models.mixers.recurrent import Recurrent
from rootcellar.models.norms import scaled
from rootcellar.models.spec import Declare, Params
from rootcellar.ops.products import product
from rootcellar.ops.recurrent import causal_conv, causal_conv_sequential, course
from rootcellar.ops.ssd import ssd, ssd_sequential
from rootcellar.plan.stored import States


@dataclass(frozen=True)
class Mamba2(Recurrent):
    """One layer of ``heads`` heads of ``head_dim``, each with a state ``[head_dim, state_size]``.

    Head ``h`` shares what it writes and reads by with its group, ``h // (heads // groups)``.

    Attributes:
        taps: of the convolution that the inputs go through first.
        eps: of the norm before the output projection, which is over the heads of a group.
    """

    heads: int
    head_dim: int
    groups: int
    state_size: int
    taps: int
    eps: float
    conv_bias: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ModelError(f"mamba_n_heads={self.heads} is no multiple of mamba_n_groups={self.groups}")

    @property
    def widths(self) -> tuple[int, int, int]:
        """See ``Mixer``."""
        return self.heads, self.heads, self.head_dim

    @property
    def stored(self) -> States:
        """See ``Mixer``."""
        return States((self.taps - 1, self.channels), (self.heads, self.head_dim, self.state_size))

    @property
    def inner(self) -> int:
        """Elements of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: the inputs of all heads, and what each group writes and reads by."""
        return self.inner + 2 * self.groups * self.state_size

    def declare(self, declare: Declare, embed: int) -> Params:
        """``mamba_in`` [E, inner + channels + H]: gate, the convolution's inputs, steps; ``mamba_out``; small ones."""
        wide = self.inner + self.channels + self.heads
        params: Params = {
            "mamba_in": declare("mamba_in", (embed, wide), ("embed", None), "random", packing.transposed, (0,)),
            "mamba_conv": declare("mamba_conv", (self.taps, self.channels), (None, None), "random", packing.depthwise),
            "mamba_dt_bias": replace(declare("mamba_dt_bias", (self.heads,), (None,), "ones"), wide=True),
            "mamba_a_log": replace(declare("mamba_a_log", (self.heads,), (None,), "ones"), wide=True),
            "mamba_d": declare("mamba_d", (self.heads,), (None,), "ones"),
            "mamba_norm": declare("mamba_norm", (self.inner,), (None,), "ones"),
            "mamba_out": declare("mamba_out", (self.inner, embed), (None, "embed"), "random", packing.transposed, (0,)),
        }
        if self.conv_bias:
            params["mamba_conv_bias"] = declare("mamba_conv_bias", (self.channels,), (None,), "zeros")
        if self.proj_bias:
            params["mamba_in_bias"] = declare("mamba_in_bias", (wide,), (None,), "zeros")
            params["mamba_out_bias"] = declare("mamba_out_bias", (embed,), (None,), "zeros")
        return params

    def run(
        self, params: Params, x: jax.Array, batch: ForwardBatch, buffers: Sequence[jax.Array]
    ) -> tuple[jax.Array, Sequence[jax.Array]]:
        """See ``Mixer``."""
        way = course(batch.table, batch.rows, batch.positions)
        gate, mixed, dt = self._project(params, x)
        conv_weights = params["mamba_conv"], self._conv_bias(params)
        mixed, conv = causal_conv(buffers[0], mixed, *conv_weights, way, self.conv_in_place(batch))
        inputs, b, c = self._split(mixed)
        y, state = ssd(buffers[1], inputs, dt, self._decay(params), b, c, way, self.in_place(batch))
        return self._merge(params, y, inputs, gate), [conv, state]

    def plain(self, params: Params, x: jax.Array) -> jax.Array:
        """See ``Mixer``: token after token."""
        gate, mixed, dt = self._project(params, x)
        inputs, b, c = self._split(causal_conv_sequential(mixed, params["mamba_conv"], self._conv_bias(params)))
        start = jnp.zeros((self.heads, self.head_dim, self.state_size))
        y, _ = ssd_sequential(start, inputs, dt, self._decay(params), b, c)
        return self._merge(params, y, inputs, gate)

    def _project(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gate ``[T, inner]``, the convolution's inputs ``[T, channels]`` and steps, float32 ``[T, H]``."""
        wide = product(x, params["mamba_in"])
        if self.proj_bias:
            wide = wide + params["mamba_in_bias"]
        gate, mixed, dt = jnp.split(wide, (self.inner, self.inner + self.channels), axis=-1)
        return gate, mixed, jax.nn.softplus(dt.astype(jnp.float32) + params["mamba_dt_bias"].astype(jnp.float32))

    def _split(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the convolution gave, through its activation: inputs ``[T, H, P]``, and by group ``b``, ``c``."""
        shared = self.groups * self.state_size
        inputs, b, c = jnp.split(jax.nn.silu(mixed), (self.inner, self.inner + shared), axis=-1)
        by_group = (-1, self.groups, self.state_size)
        return inputs.reshape(-1, self.heads, self.head_dim), b.reshape(by_group), c.reshape(by_group)

    def _merge(self, params: Params, y: jax.Array, inputs: jax.Array, gate: jax.Array) -> jax.Array:
        """``[T, E]`` of the heads' outputs, their inputs, and the gate that the norm sees."""
        y = y + params["mamba_d"].astype(jnp.float32)[:, None] * inputs
        y = y.reshape(len(y), -1) * jax.nn.silu(gate.astype(jnp.float32))
        y = scaled(y.reshape(len(y), self.groups, -1), self.eps).reshape(y.shape).astype(gate.dtype)
        out = product(y * params["mamba_norm"].astype(y.dtype), params["mamba_out"])
        return out + params["mamba_out_bias"] if self.proj_bias else out

    def _conv_bias(self, params: Params) -> jax.Array | None:
        return params["mamba_conv_bias"] if self.conv_bias else None

    @staticmethod
    def _decay(params: Params) -> jax.Array:
        return -jnp.exp(params["mamba_a_log"].astype(jnp.float32))
