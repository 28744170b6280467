"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads are kept as one compressed vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from rootcellar.cache.kind import Rule
from rootcellar.models import packing
from rootcellar.models.forward_batch import ForwardBatch
from rootcellar.models.norms import Norm
from rootcellar.models.rope import RopeConfig, check_turned, turn
from rootcellar.models.spec import Axis, Declare, Params
from rootcellar.ops.backends import Reach, attention
from rootcellar.ops.products import product
from rootcellar.plan.stored import Latents

_HEADS: tuple[Axis, ...] = (None, "heads")


@dataclass(frozen=True)
class LatentAttention:
    """Latent attention of one layer, to everything before a token.

    Attributes:
        nope_dim, rope_dim: elements of a head's query and key that are not turned, and that are.
        value_dim: elements of a head's value.
        kv_rank: elements of the compressed key and value.
        q_rank: elements of the compressed query; None: queries are not compressed.
        rope: of the turned part; its frequencies are those of a head of ``rope_dim``.
        scale: of the scores.
        norm: of compressed queries, keys and values.
        bias: the compressing maps and the last one have biases.
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int | None
    rope: RopeConfig
    scale: float
    norm: Norm
    bias: bool = False

    def __post_init__(self) -> None:
        check_turned(self.rope, self.rope_dim, "qk_rope_head_dim")

    @property
    def rule(self) -> Rule:
        """See ``Mixer``."""
        return "full"

    @property
    def span(self) -> int:
        """See ``Mixer``."""
        return 0

    @property
    def widths(self) -> tuple[int, int, int]:
        """See ``Mixer``: absorbed, a head is as wide as what is stored, and all heads share one."""
        return self.num_heads, 1, self.kv_rank + self.rope_dim

    @property
    def stored(self) -> Latents:
        """See ``Mixer``."""
        return Latents(self.kv_rank, self.rope_dim)

    def declare(self, declare: Declare, embed: int) -> Params:
        """With D = nope + rope: ``q`` [E, H, D], or compressed ``q_a`` [E, Q], ``q_a_norm`` [Q], ``q_b`` [Q, H, D];
        ``kv_a`` [E, R + rope], ``kv_a_norm`` [R], ``kv_b`` [H, nope + V, R], ``o`` [H, V, E], and biases.
        """  # fmt: skip
        heads, dim = self.num_heads, self.nope_dim + self.rope_dim
        rows = self.kv_rank + self.rope_dim
        params: Params = {
            "kv_a": declare("kv_a", (embed, rows), ("embed", None), "random", packing.transposed, (0,)),
            "kv_a_norm": declare("kv_a_norm", (self.kv_rank,), (None,), self.norm.init),
            "kv_b": declare(
                "kv_b", (heads, self.nope_dim + self.value_dim, self.kv_rank), ("heads", None, None), "random",
                packing.outputs_first,
            ),
            "o": declare(
                "o", (heads, self.value_dim, embed), ("heads", None, "embed"), "random", packing.heads_in, (0, 1)
            ),
        }  # fmt: skip
        if self.q_rank is None:
            params["q"] = declare(
                "q", (embed, heads, dim), ("embed", "heads", None), "random", packing.transposed, (0,)
            )
        else:
            rank = self.q_rank
            params["q_a"] = declare("q_a", (embed, rank), ("embed", None), "random", packing.transposed, (0,))
            params["q_a_norm"] = declare("q_a_norm", (rank,), (None,), self.norm.init)
            params["q_b"] = declare(
                "q_b", (rank, heads, dim), (None, "heads", None), "random", packing.transposed, (0,)
            )
        if self.bias:
            params["kv_a_bias"] = declare("kv_a_bias", (rows,), (None,), "zeros")
            params["o_bias"] = declare("o_bias", (embed,), (None,), "zeros")
            if self.q_rank is not None:
                params["q_a_bias"] = declare("q_a_bias", (self.q_rank,), (None,), "zeros")
        return params

    def run(
        self, params: Params, x: jax.Array, batch: ForwardBatch, buffers: Sequence[jax.Array]
    ) -> tuple[jax.Array, Sequence[jax.Array]]:
        """See ``Mixer``: absorbed."""
        straight, turned, latents = self._project(params, x, jnp.maximum(batch.positions, 0))
        keys = params["kv_b"][:, : self.nope_dim]
        q = jnp.concatenate([jnp.einsum("thd,hdr->thr", straight, keys), turned], axis=-1) * self.scale
        axes = batch.layout.axes
        function = attention(batch.backend, batch.layout, Reach())
        attend = batch.local(function, (_HEADS, (), (), (), (), *axes), (_HEADS, *axes))
        out, *buffers = attend(q, latents, batch.table, batch.rows, batch.positions, *buffers)
        values = params["kv_b"][:, self.nope_dim :]
        out = jnp.einsum("thr,hvr->thv", out[..., : self.kv_rank].astype(x.dtype), values)
        return self._merge(params, out), buffers

    def plain(self, params: Params, x: jax.Array) -> jax.Array:
        """See ``Mixer``: every head's keys and values written out."""
        at = jnp.arange(x.shape[0], dtype=jnp.int32)
        straight, turned, latents = self._project(params, x, at)
        q = jnp.concatenate([straight, turned], axis=-1)
        compressed, shared = jnp.split(latents, [self.kv_rank], axis=-1)
        each = jnp.einsum("tr,hdr->thd", compressed, params["kv_b"])
        k, v = jnp.split(each, [self.nope_dim], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(shared[:, None], (*k.shape[:2], self.rope_dim))], axis=-1)
        scores = jnp.einsum("thd,shd->hts", q, k, preferred_element_type=jnp.float32) * self.scale
        weights = jax.nn.softmax(jnp.where(at[:, None] >= at, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return self._merge(params, jnp.einsum("hts,shv->thv", weights, v))

    def _project(self, params: Params, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of ``x`` [T, E]: queries ``[T, H, nope]`` and, turned, ``[T, H, rope]``; latents ``[T, R + rope]``."""
        if self.q_rank is None:
            q = product(x, params["q"])
        else:
            low = product(x, params["q_a"])
            low = low + params["q_a_bias"] if self.bias else low
            q = product(self.norm(low, params["q_a_norm"]), params["q_b"])
        rows = product(x, params["kv_a"])
        rows = rows + params["kv_a_bias"] if self.bias else rows
        compressed, k = jnp.split(rows, [self.kv_rank], axis=-1)
        turned, k = turn(self.rope, positions, q[..., self.nope_dim :], k[:, None])
        latents = jnp.concatenate([self.norm(compressed, params["kv_a_norm"]), k[:, 0]], axis=-1)
        return q[..., : self.nope_dim], turned, latents

    def _merge(self, params: Params, out: jax.Array) -> jax.Array:
        """``[T, E]`` of the heads' outputs ``[T, H, V]``."""
        mixed = product(out, params["o"], (0, 1))
        return mixed + params["o_bias"] if self.bias else mixed

    # -- tensor parallelism: heads are split, and every device stores all latents --------------------------------

    def served(self, tp_size: int) -> Self:  # noqa: ARG002 - the same on any number
        """See ``Mixer``."""
        return self

    def splits(self, tp_size: int) -> bool:
        """See ``Mixer``."""
        return self.num_heads % tp_size == 0

    def as_served(self, params: Params, tp_size: int) -> Params:  # noqa: ARG002 - see served
        """See ``Mixer``."""
        return params
