"""Attention with keys and values by head (MHA, GQA, MQA): full, sliding-window or chunked local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.forward_batch import ForwardBatch
from rootcellar.models.norms import Norm, scaled
from rootcellar.models.rope import RopeConfig, check_turned, turn
from rootcellar.models.spec import Axis, Declare, Params
from rootcellar.ops.backends import Reach, attention
from rootcellar.ops.products import product
from rootcellar.plan.stored import Heads

_ROWS: tuple[Axis, ...] = (None, "heads")
_KV_ROWS: tuple[Axis, ...] = (None, "kv_heads")


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position (Llama 4's layers without rotary embeddings).

    The query at position ``p`` is multiplied by ``1 + scale * log(1 + floor((p + 1) / floor))``.
    """

    floor: float
    scale: float


@dataclass(frozen=True)
class Attention:
    """Attention of one layer.

    ``num_heads`` query heads share ``num_kv_heads`` key/value heads, each of ``head_dim``; query head ``h`` reads
    key/value head ``h // (num_heads // num_kv_heads)``.

    Attributes:
        rule, span: what a token sees: everything before it, a window of ``span`` tokens (itself included), or the part
            before it of its own chunk of ``span`` tokens.
        rope: None: positions are not told (NoPE).
        scale: of the scores; None: ``head_dim ** -0.5``.
        softcap: scores are squashed to within it by tanh (Gemma 2); None: they are not.
        qk_norm: of queries and keys by head, before they are turned; ``qk_whole``: of all heads together (OLMo).
        qk_unit: queries and keys are divided by their root mean square after they are turned; the epsilon. None: not.
        v_unit: so are values (Gemma 4).
        one_kv: one projection is for keys and values, which part when the keys are normed (Gemma 4's full layers).
        sinks: each head has a learned score that takes weight and gives nothing (gpt-oss).
        gated: each head's output is multiplied by a sigmoid of the layer's input (Qwen3-Next).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rule: Literal["full", "sliding_window", "chunked_local"] = "full"
    span: int = 0
    rope: RopeConfig | None = None
    scale: float | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Norm | None = None
    qk_whole: bool = False
    qk_unit: float | None = None
    v_unit: float | None = None
    one_kv: bool = False
    sinks: bool = False
    temperature: Temperature | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads={self.num_heads} is no multiple of num_key_value_heads={self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.rope is not None:
            check_turned(self.rope, self.head_dim, "head_dim")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def widths(self) -> tuple[int, int, int]:
        """See ``Mixer``."""
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def stored(self) -> Heads:
        """See ``Mixer``."""
        return Heads(self.num_kv_heads, self.head_dim, self.group_size)

    @property
    def reach(self) -> Reach:
        """What a query sees, for the attention backends."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return Reach(self.rule, self.span, scale, self.softcap or 0.0)

    def declare(self, declare: Declare, embed: int) -> Params:
        """``qkv`` [E, K, G + 2, D], ``o`` [H, D, E]; biases, norms by head and sinks where there are any.

        Where heads are ``gated`` each query of ``qkv`` has its gate after it: [E, K, 2 G + 2, D]. With ``one_kv`` it is
        ``qk`` [E, K, G + 1, D].
        """
        heads, kv, dim = self.num_heads, self.num_kv_heads, self.head_dim
        group = self.group_size * (2 if self.gated else 1)
        by_group: tuple[Axis, ...] = ("kv_heads", None, None)
        packed, rows, how = ("qk", group + 1, packing.qk) if self.one_kv else ("qkv", group + 2, packing.qkv)
        params: Params = {
            packed: declare(packed, (embed, kv, rows, dim), ("embed", *by_group), "random", how, (0,)),
            "o": declare("o", (heads, dim, embed), ("heads", None, "embed"), "random", packing.heads_in, (0, 1)),
        }
        if self.qkv_bias:
            params["qkv_bias"] = declare("qkv_bias", (kv, group + 2, dim), by_group, "zeros", packing.qkv_bias)
        if self.o_bias:
            params["o_bias"] = declare("o_bias", (embed,), (None,), "zeros")
        if self.qk_norm is not None and self.qk_whole:
            grouped = packing.flat
            params["q_norm"] = declare("q_norm", (heads, dim), ("heads", None), self.qk_norm.init, grouped)
            params["k_norm"] = declare("k_norm", (kv, dim), ("kv_heads", None), self.qk_norm.init, grouped)
        elif self.qk_norm is not None:
            for name in ("q_norm", "k_norm"):
                params[name] = declare(name, (dim,), (None,), self.qk_norm.init)
        if self.sinks:
            params["sinks"] = declare("sinks", (heads,), ("heads",), "random")
        return params

    def run(
        self, params: Params, x: jax.Array, batch: ForwardBatch, buffers: Sequence[jax.Array]
    ) -> tuple[jax.Array, Sequence[jax.Array]]:
        """See ``Mixer``."""
        q, k, v, gate = self.project(params, x, batch.turned_by)
        axes = batch.layout.axes
        backend, positions = batch.attended
        attend = batch.local(
            attention(backend, batch.layout, self.reach),
            (_ROWS, _KV_ROWS, _KV_ROWS, ("heads",), (), (), (), *axes),
            (_ROWS, *axes),
        )
        sinks = self._sinks(params)
        out, *buffers = attend(q, k, v, sinks, batch.table, batch.rows, positions, *buffers)
        return self.merge(params, out.astype(x.dtype), gate), buffers

    def plain(self, params: Params, x: jax.Array) -> jax.Array:
        """See ``Mixer``: scores of every pair, masked; softmax in float32."""
        at = jnp.arange(x.shape[0], dtype=jnp.int32)
        q, k, v, gate = self.project(params, x, at)
        return self.merge(params, self.attend_plain(params, q, k, v, self.sees(at, at)), gate)

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether positions ``query`` [T] see positions ``key`` [S]: bool [T, S]."""
        return self.reach.sees(query[:, None], key[None, :])

    def attend_plain(self, params: Params, q: jax.Array, k: jax.Array, v: jax.Array, sees: jax.Array) -> jax.Array:
        """q ``[T, H, D]``, k and v ``[S, K, D]``, ``sees`` bool ``[T, S]`` -> ``[T, H, D]``."""
        grouped = q.reshape(q.shape[0], self.num_kv_heads, self.group_size, self.head_dim)
        scores = jnp.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type=jnp.float32) * self.reach.scale
        scores = jnp.where(sees, self.reach.capped(scores), -jnp.inf)
        sinks = self._sinks(params).reshape(self.num_kv_heads, self.group_size, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :-1].astype(v.dtype)
        return jnp.einsum("kgts,skd->tkgd", weights, v).reshape(q.shape)

    def project(
        self, params: Params, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Queries ``[T, H, D]``, keys and values ``[T, K, D]`` of ``x`` ``[T, E]``, normed and turned; and gates.

        ``positions``: int32 [T], or [3, T] (see ``rope.turn``).
        """
        rows, kv = product(x, params["qk" if self.one_kv else "qkv"]), 1 if self.one_kv else 2
        if self.qkv_bias:
            rows = rows + params["qkv_bias"]
        q, k, v = rows[:, :, :-kv], rows[:, :, -kv], rows[:, :, -1]
        gate = q[:, :, 1::2].reshape(-1, self.num_heads, self.head_dim) if self.gated else None
        q = (q[:, :, ::2] if self.gated else q).reshape(-1, self.num_heads, self.head_dim)
        if self.qk_norm is not None:
            q, k = self._normed(q, params["q_norm"]), self._normed(k, params["k_norm"])
        if self.rope is not None:
            q, k = turn(self.rope, positions, q, k)
        if self.qk_unit is not None:
            q, k = (scaled(part, self.qk_unit).astype(part.dtype) for part in (q, k))
        if self.v_unit is not None:
            v = scaled(v, self.v_unit).astype(v.dtype)
        if self.temperature is not None:
            grown = jnp.floor((positions.astype(jnp.float32) + 1) / self.temperature.floor)
            q = (q * (1 + self.temperature.scale * jnp.log1p(grown))[:, None, None]).astype(q.dtype)
        return q, k, v, gate

    def _normed(self, part: jax.Array, weight: jax.Array) -> jax.Array:
        """Queries or keys ``[T, heads, D]``, normed by head or all together."""
        assert self.qk_norm is not None
        if not self.qk_whole:
            return self.qk_norm(part, weight)
        return self.qk_norm(part.reshape(len(part), -1), weight.reshape(-1)).reshape(part.shape)

    def merge(self, params: Params, out: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """``[T, E]`` of the heads' outputs ``[T, H, D]`` and their gates."""
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        mixed = product(out, params["o"], (0, 1))
        return mixed + params["o_bias"] if self.o_bias else mixed

    def _sinks(self, params: Params) -> jax.Array:
        """Float32 ``[H]``; minus infinity takes no weight."""
        return params["sinks"].astype(jnp.float32) if self.sinks else jnp.full(self.num_heads, -jnp.inf, jnp.float32)

    # -- tensor parallelism ---------------------------------------------------------------------------------------

    def copies(self, tp_size: int) -> int:
        """How often each KV head is repeated on ``tp_size`` devices."""
        kv = self.num_kv_heads
        if kv >= tp_size or tp_size % kv or self.group_size % (tp_size // kv):
            return 1
        return tp_size // kv

    def served(self, tp_size: int) -> Self:
        """See ``Mixer``: fewer KV heads than devices are repeated, and their query heads divided among the copies."""
        return replace(self, num_kv_heads=self.num_kv_heads * self.copies(tp_size))

    def splits(self, tp_size: int) -> bool:
        """See ``Mixer``."""
        return self.served(tp_size).num_kv_heads % tp_size == 0

    def as_served(self, params: Params, tp_size: int) -> Params:
        """See ``Mixer``: ``[.., K, G + 2, D]`` to ``[.., K * copies, G / copies + 2, D]``."""
        copies = self.copies(tp_size)
        if copies == 1:
            return params
        packed = [name for name in ("qkv", "qkv_bias", "qk") if name in params]
        repeated = {name: _repeat(params[name], copies, 1 if self.one_kv else 2) for name in packed}
        if self.qk_norm is not None and self.qk_whole and "k_norm" in params:  # a mean over copies is the mean
            repeated["k_norm"] = _numpy(params["k_norm"]).repeat(params["k_norm"], copies, axis=0)
        return {**params, **repeated}


def _numpy(array: Any) -> Any:
    """Who computes with ``array``: NumPy where it is in host memory, since no device may have room for it; or JAX."""
    return array.__array_namespace__()


def _repeat(array: Any, copies: int, shared: int) -> Any:
    """``shared``: rows of a key/value head behind its queries."""
    *lead, kv, rows, dim = array.shape
    group = rows - shared
    queries = array[..., :group, :].reshape(*lead, kv * copies, group // copies, dim)
    pairs = _numpy(array).repeat(array[..., group:, :], copies, axis=len(lead))
    return _numpy(array).concat([queries, pairs], axis=-2)
