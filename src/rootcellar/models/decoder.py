"""The decoder: layers of a mixer and a feed-forward, composed by ``ModelConfig``.

Tokens are packed: every sequence's new tokens lie one after another in a single axis ``T``, and only ``mix`` knows
where one ends. What is cached never appears as a result; ``mix`` puts it where it wants it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rootcellar.models.model import ModelConfig
from rootcellar.models.spec import Params
from rootcellar.ops.products import product, rows

Mix = Callable[[int, Params, jax.Array], jax.Array]
"""``mix(layer, params of the layer, x [T, E]) -> [T, E]``: the layer's mixer over the packed tokens."""


def embed(params: Params, cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
    """What enters the first layer for ``tokens`` int32 ``[T]``: ``[T, E]`` in the dtype of the norms.

    Token ids must lie in the vocabulary: it is not checked here. What is no token has a vector of its own instead.
    """
    hidden = rows(params["embed"], tokens, params["norm"].dtype)
    return hidden if cfg.embed_scale == 1 else hidden * jnp.asarray(cfg.embed_scale, hidden.dtype)


def forward(params: Params, cfg: ModelConfig, tokens: jax.Array, mix: Mix) -> jax.Array:
    """Hidden states ``[T, E]`` after the final norm, in the params' dtype; ``tokens`` as for ``embed``."""
    return through_layers(params, cfg, embed(params, cfg, tokens), mix)


def through_layers(
    params: Params, cfg: ModelConfig, hidden: jax.Array, mix: Mix, tell: Callable[[jax.Array], None] | None = None
) -> jax.Array:
    """Hidden states ``[T, E]`` after the final norm, of those that enter the first layer.

    ``mix`` is called once for each layer in order, and ``tell`` with what each router chose: int32 [T, K].
    """
    for index, (layer, weights) in enumerate(zip(cfg.layers, params["layers"], strict=True)):
        parts = {"attn": functools.partial(mix, index, weights)}
        if layer.feed_forward is not None:
            parts["mlp"] = functools.partial(layer.feed_forward.apply, weights, tell=tell)
        for part, apply in parts.items():
            out = apply(cfg.norm(hidden, weights[f"{part}_norm"]) if layer.pre_norms else hidden)
            out = cfg.norm(out, weights[f"{part}_post_norm"]) if layer.post_norms else out
            hidden = hidden + (out if cfg.residual_scale == 1 else out * jnp.asarray(cfg.residual_scale, out.dtype))
        hidden = hidden * weights["scale"].astype(hidden.dtype) if layer.scaled else hidden
    return cfg.norm(hidden, params["norm"])


def logits(params: Params, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Scores of the next token, float32 ``[..., V]``, of hidden states ``[..., E]`` from ``forward``."""
    if cfg.tie_word_embeddings:
        scores = product(hidden, params["embed"], (1,), jnp.float32)
    else:
        scores = product(hidden, params["head"], (0,), jnp.float32)
    if cfg.logit_scale != 1:
        scores = scores * cfg.logit_scale
    if cfg.logit_softcap is not None:
        scores = jnp.tanh(scores / cfg.logit_softcap) * cfg.logit_softcap
    return scores
