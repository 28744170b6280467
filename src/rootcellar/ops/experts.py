"""Mixture of experts: which experts a token goes to, and the products of many tokens with many experts' matrices.

Two forms compute the same products (``grouped``):

* ``ragged``: tokens sorted by expert, and ``jax.lax.ragged_dot``, which accelerators have kernels for.
* ``blocks``: tokens sorted by expert, cut into blocks of one expert each, and a loop over the blocks. XLA for CPUs
  computes ``ragged_dot`` as every token times every expert; the loop was 20 to 280 times faster there (64 experts of
  512 x 256, 6 for each token, 256 to 1 tokens), and reads an expert's weights once for each block.

Neither drops a token: there is no capacity that could overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rootcellar.errors import ModelError

# Tokens in a block at most: enough to use what was read of an expert's matrices, little enough to waste few rows.
_BLOCK = 32


@dataclass(frozen=True)
class Router:
    """How the experts of a token are chosen and weighed.

    * softmax, the best ``top_k`` (DeepSeek V2's ``greedy``); with ``renormalise`` the weights of the chosen sum to one
      (Qwen), which is the same as a softmax over the scores of the chosen alone (gpt-oss, Granite).
    * groups (DeepSeek V2, ``group_limited_greedy``): of ``groups`` equal parts of the experts only the best
      ``top_groups`` count, a group being as good as its best expert.
    * sigmoid with a ``correction`` (DeepSeek V3, ``noaux_tc``): a learned term that is added where experts are
      compared, and left out of the weights. A group is then as good as its two best experts together.
    * sigmoid without (Llama 4).

    ``scale`` multiplies the weights at last.
    """

    experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ModelError(f"top_k={self.top_k} experts for each token, and there are {self.experts}")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ModelError(
                f"{self.experts} experts cannot be chosen from top_groups={self.top_groups} of groups={self.groups}: "
                "the groups must be equally large, and top_groups at least 1 and at most groups"
            )
        members = self.experts // self.groups
        if self.top_k > self.top_groups * members:
            raise ModelError(f"top_k={self.top_k} is more than the {self.top_groups} groups of {members} experts hold")
        if self.correction and self.groups > 1 and members < 2:
            raise ModelError(f"{self.groups} groups of one expert: groups are compared by their two best experts")


def route(router: Router, logits: Array, correction: Array | None = None) -> tuple[Array, Array]:
    """The experts of each token and their weights.

    Args:
        router: how they are chosen.
        logits: float32 ``[T, N]``, a score of each expert.
        correction: float32 ``[N]``, where ``router.correction``.

    Returns:
        int32 ``[T, K]``, all different in a row, and float32 ``[T, K]``.
    """
    # Softmax and sigmoid keep the order of the logits, so these are compared; but a correction is added to the scores.
    merit = logits if correction is None else jax.nn.sigmoid(logits) + correction
    if router.top_groups < router.groups:
        merit = jnp.where(_in_best_groups(router, merit), merit, -jnp.inf)
    _, chosen = lax.top_k(merit, router.top_k)
    best = jnp.take_along_axis(logits, chosen, axis=-1)
    if router.scores == "sigmoid":
        weights = jax.nn.sigmoid(best)
        if router.renormalise:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    elif router.renormalise:
        weights = jax.nn.softmax(best, axis=-1)
    else:
        weights = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return chosen, weights * router.scale


def _in_best_groups(router: Router, merit: Array) -> Array:
    """Which experts lie in the best groups: bool ``[T, N]``."""
    members = merit.reshape(-1, router.groups, router.experts // router.groups)
    worth = jnp.sum(lax.top_k(members, 2 if router.correction else 1)[0], axis=-1)
    _, best = lax.top_k(worth, router.top_groups)
    kept = jax.nn.one_hot(best, router.groups, dtype=bool).any(axis=1)
    return jnp.repeat(kept, members.shape[2], axis=1)


Middle = Callable[[Array, Array], Array]
"""What stands between an expert's two products: ``(rows [M, P, 2 * I / P], the expert of each, [M] or []) ->
[M, P, I / P]``, where of each of ``P`` parts the gates come before the ups."""


def grouped(
    x: Array,
    chosen: Array,
    gate_up: Array,
    middle: Middle,
    down: Array,
    form: Literal["blocks", "ragged"] | None = None,
) -> Array:
    """Every token through each of its experts: a product, ``middle``, another product.

    Args:
        x: ``[T, E]``, or ``[T * K, E]`` where a token's rows are not the same for all its experts.
        chosen: int32 ``[T, K]``, the experts of each token.
        gate_up: ``[N, P, E, 2 * I / P]``: an expert's matrix in parts, a part's gates before its ups. Each of ``P``
            devices has one. Were all gates before all ups, a device's columns would not be one range of the matrix.
        middle: see ``Middle``.
        down: ``[N, I, E]``.
        form: see the top of this file; None: the faster one where the program runs.

    Returns:
        ``[T, K, E]`` in the dtype of ``x``.
    """
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    experts, parts, embed, wide = gate_up.shape
    pairs = _Pairs(order, flat[order], jnp.bincount(flat, length=experts))
    whole = gate_up.swapaxes(1, 2).reshape(experts, embed, parts * wide)  # of one part it is the same bytes

    def between(rows: Array, expert: Array) -> Array:
        return middle(rows.reshape(-1, parts, wide), expert).reshape(len(rows), -1)

    def run(form: Callable[..., Array]) -> Callable[..., Array]:
        return lambda x, gate_up, down: form(pairs, x, gate_up, between, down)

    if form is None:
        out = lax.platform_dependent(x, whole, down, cpu=run(_blocks), default=run(_ragged))
    else:
        out = run({"blocks": _blocks, "ragged": _ragged}[form])(x, whole, down)
    return out.reshape(*chosen.shape, x.shape[1])


class _Pairs(NamedTuple):
    """The pairs of a token and an expert, sorted by expert."""

    order: Array
    """int32 ``[M]``: each pair's index among them as they were given."""
    expert: Array
    """int32 ``[M]``: of each pair."""
    counts: Array
    """int32 ``[N]``: pairs of each expert."""

    def rows(self, x: Array, pairs: Array) -> Array:
        """The rows of ``x`` of some pairs, by their index as they were given."""
        return x[pairs // (self.order.size // x.shape[0])]


Between = Callable[[Array, Array], Array]
"""``Middle`` between plain matrices: ``(rows [M, 2 * I], experts) -> [M, I]``."""


def _ragged(pairs: _Pairs, x: Array, gate_up: Array, between: Between, down: Array) -> Array:
    rows = lax.ragged_dot(pairs.rows(x, pairs.order), gate_up, pairs.counts)
    out = lax.ragged_dot(between(rows, pairs.expert), down, pairs.counts)
    return out[jnp.argsort(pairs.order)].astype(x.dtype)


def _blocks(pairs: _Pairs, x: Array, gate_up: Array, between: Between, down: Array) -> Array:
    """A loop over blocks of ``size`` pairs of one expert, the last of each expert perhaps not full.

    The loop is as long as there could be blocks at most, and skips those that there are not: its length must be known
    for it to be differentiated.
    """
    count, experts = pairs.order.size, gate_up.shape[0]
    size = min(_BLOCK, 1 << (-(-count // experts) - 1).bit_length())
    blocks = -(-pairs.counts // size)  # of each expert
    ends = jnp.cumsum(blocks)
    place = jnp.arange(count) - (jnp.cumsum(pairs.counts) - pairs.counts)[pairs.expert]  # among its expert's pairs
    most = min(count, count // size + experts)
    members = jnp.full((most, size), count, jnp.int32)  # the pairs of each block; `count` where there is none
    members = members.at[(ends - blocks)[pairs.expert] + place // size, place % size].set(pairs.order)
    which = jnp.searchsorted(ends, jnp.arange(most), side="right")  # the expert of each block, or N

    def one(expert: Array, member: Array) -> Array:
        first, second = (lax.dynamic_index_in_dim(w, expert, keepdims=False) for w in (gate_up, down))
        rows = pairs.rows(x, jnp.minimum(member, count - 1))
        return (between(rows @ first, expert) @ second).astype(x.dtype)

    def body(out: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        rows = lax.cond(block[0] < experts, one, lambda *_: jnp.zeros((size, x.shape[1]), x.dtype), *block)
        return out.at[block[1]].set(rows, mode="drop"), None

    out, _ = lax.scan(body, jnp.zeros((count, x.shape[1]), x.dtype), (which, members))
    return out
