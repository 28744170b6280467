"""Where weights and pools lie: on one device, or split over the axis ``tensor`` of a mesh.

Tensor parallelism in the manner of Megatron-LM (Shoeybi et al., 2019): heads and the feed-forward's inner dimension are
split, so that each layer needs two sums over the devices. Attention itself stays on each device, with the KV heads
there. When there are fewer KV heads than devices, each is repeated, so that every device has one of its own; the query
heads that shared it are divided among the copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rootcellar.errors import ConfigError
from rootcellar.models.config import ModelConfig
from rootcellar.models.params import Params, ParamSpec, declare

AXIS = "tensor"
# Logical axes of parameters that are split over the devices.
_SPLIT = ("heads", "kv_heads", "mlp", "vocab")


@dataclass(frozen=True)
class Placement:
    """How a model lies on ``tp_size`` devices."""

    model: ModelConfig
    tp_size: int = 1

    def __post_init__(self) -> None:
        found = jax.device_count()
        if self.tp_size > found:
            raise ConfigError(f"tp_size={self.tp_size}, and there are {found} devices: lower tp_size")

    @cached_property
    def mesh(self) -> Mesh | None:
        """The mesh with the axis ``tensor``; None for a single device."""
        return None if self.tp_size == 1 else Mesh(np.array(jax.devices()[: self.tp_size]), (AXIS,))

    @cached_property
    def copies(self) -> int:
        """How often each KV head is repeated."""
        kv, tp = self.model.num_kv_heads, self.tp_size
        if kv >= tp or tp % kv or self.model.group_size % (tp // kv):
            return 1
        return tp // kv

    @cached_property
    def served(self) -> ModelConfig:
        """The model as it is computed: with its KV heads repeated."""
        return replace(self.model, num_kv_heads=self.model.num_kv_heads * self.copies)

    @cached_property
    def splits_heads(self) -> bool:
        """Whether attention is split; otherwise every device computes all of it."""
        return self.tp_size > 1 and self.served.num_kv_heads % self.tp_size == 0

    def place(self, params: Params) -> Params:
        """Parameters of ``model`` where they are computed; what lies there already is not copied.

        The place is said outright: an array that left it open would make a step that knew another compile again.
        """
        if self.copies > 1:
            params = {**params, "layers": [self._repeat_kv_heads(layer) for layer in params["layers"]]}
        placed: Params = jax.tree.map(
            lambda spec, array: jax.device_put(array, self._sharding(spec)), declare(self.served), params
        )
        return placed

    def abstract(self, dtype: Any) -> Params:
        """The params as they will lie, as ``jax.ShapeDtypeStruct``: for compiling and sizing without weights."""
        shapes: Params = jax.tree.map(
            lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=self._sharding(spec)), declare(self.served)
        )
        return shapes

    def _sharding(self, spec: ParamSpec) -> Sharding:
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        axes: list[str | None] = []
        for name, size in zip(spec.axes, spec.shape, strict=True):
            split = name in _SPLIT and size % self.tp_size == 0 and AXIS not in axes
            axes.append(AXIS if split and (self.splits_heads or name not in ("heads", "kv_heads")) else None)
        return NamedSharding(self.mesh, P(*axes))

    def _repeat_kv_heads(self, layer: Params) -> Params:
        """``[.., K, G + 2, D]`` to ``[.., K * copies, G / copies + 2, D]``: queries divided, key and value repeated."""
        new = dict(layer)
        for name in ("qkv", "qkv_bias"):
            if name in layer:
                new[name] = _repeat(layer[name], self.copies)
        return new

    @property
    def pool_sharding(self) -> Sharding:
        """Of a pool's buffers ``[pages, 2, kv_heads, page_size, head_dim]``: by KV head."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, P(None, None, AXIS if self.splits_heads else None))

    def local(self, attend):  # type: ignore[no-untyped-def]
        """An attention function (``ops.attention``) that each device runs over the heads it has."""
        if self.mesh is None:
            return attend
        heads = AXIS if self.splits_heads else None
        pool, rows = P(None, None, heads), P(None, heads)
        return jax.shard_map(
            attend,
            mesh=self.mesh,
            in_specs=(pool, rows, rows, rows, P(), P(), P()),
            out_specs=(rows, pool),
            check_vma=False,
        )

    def by_vocabulary(self, scores: Array) -> Array:
        """Inside a compiled step: ``scores`` [N, V] computed by each device for its own part of the vocabulary.

        Without it XLA gathers the whole embedding on every device, a gigabyte for each step, rather than the scores.
        """
        if self.mesh is None or scores.shape[-1] % self.tp_size:
            return scores
        return jax.lax.with_sharding_constraint(scores, NamedSharding(self.mesh, P(None, AXIS)))

    def everywhere(self, array: Array) -> Array:
        """Inside a compiled step: the whole ``array`` on every device."""
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, P()))


def _repeat(array: Array, copies: int) -> Array:
    *lead, kv, rows, dim = array.shape
    group = rows - 2
    queries = array[..., :group, :].reshape(*lead, kv * copies, group // copies, dim)
    pairs = jnp.repeat(array[..., group:, :], copies, axis=len(lead))
    return jnp.concatenate([queries, pairs], axis=-2)
