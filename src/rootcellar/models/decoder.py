"""The one dense decoder: Qwen2, Qwen3, Llama and their like are switches of it.

Tokens are packed: every sequence's new tokens lie one after another in a single axis ``T``, and only ``attend`` knows
where one ends. Keys and values never appear as results; ``attend`` puts them where it wants them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rootcellar.models.config import ModelConfig
from rootcellar.models.params import Params
from rootcellar.models.rope import rotate, rotations

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""``attend(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]``: q and k are rotated, the scale is attend's."""


def forward(params: Params, cfg: ModelConfig, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
    """Hidden states ``[T, E]`` after the final norm, in the params' dtype; ``tokens`` and ``positions`` int32 ``[T]``.

    ``attend`` is called once for each layer in order. Token ids must lie in the vocabulary: it is not checked here.
    """
    cos, sin = rotations(cfg.rope, cfg.head_dim, positions)
    hidden = params["embed"][tokens]
    for index, layer in enumerate(params["layers"]):
        x = rms_norm(hidden, layer["attn_norm"], cfg.rms_norm_eps)
        q, k, v = _project_qkv(layer, cfg, x)
        out = attend(index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        out = jnp.einsum("thd,hde->te", out, layer["o"])
        hidden = hidden + (out + layer["o_bias"] if cfg.o_bias else out)
        x = rms_norm(hidden, layer["mlp_norm"], cfg.rms_norm_eps)
        hidden = hidden + _mlp(layer, cfg, x)
    return rms_norm(hidden, params["norm"], cfg.rms_norm_eps)


def logits(params: Params, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Scores of the next token, float32 ``[..., V]``, of hidden states ``[..., E]`` from ``forward``."""
    if cfg.tie_word_embeddings:
        return jnp.einsum("...e,ve->...v", hidden, params["embed"], preferred_element_type=jnp.float32)
    return jnp.einsum("...e,ev->...v", hidden, params["head"], preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), float32 inside, in the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scaled.astype(x.dtype) * weight.astype(x.dtype)


def _project_qkv(layer: Params, cfg: ModelConfig, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries ``[T, H, D]``, keys and values ``[T, K, D]`` of ``x`` ``[T, E]``, normed where the model norms them."""
    rows = jnp.einsum("te,ekgd->tkgd", x, layer["qkv"])
    if cfg.qkv_bias:
        rows = rows + layer["qkv_bias"]
    q = rows[:, :, : cfg.group_size].reshape(-1, cfg.num_heads, cfg.head_dim)
    k, v = rows[:, :, cfg.group_size], rows[:, :, cfg.group_size + 1]
    if cfg.qk_norm:
        q = rms_norm(q, layer["q_norm"], cfg.rms_norm_eps)
        k = rms_norm(k, layer["k_norm"], cfg.rms_norm_eps)
    return q, k, v


def _mlp(layer: Params, cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """The gated feed-forward of ``x`` ``[T, E]``: down(silu(gate(x)) * up(x))."""
    rows = jnp.einsum("te,eci->tci", x, layer["gate_up"])
    if cfg.mlp_bias:
        rows = rows + layer["gate_up_bias"]
    out = jnp.einsum("ti,ie->te", jax.nn.silu(rows[:, 0]) * rows[:, 1], layer["down"])
    return out + layer["down_bias"] if cfg.mlp_bias else out
