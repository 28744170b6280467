"""What encoders have in common: attention over patches, layer norms, blocks, few shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rootcellar.models import packing
from rootcellar.models.encoders.encoder import EncoderStage, Laid
from rootcellar.models.feed_forward.activations import ACTIVATIONS
from rootcellar.models.packing import Views
from rootcellar.models.spec import Declare, Packing, Params


def attend(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    """q [T, N, D], k and v [S, N, D], of which those that are ``valid`` [S] are seen, in both directions: [T, N, D]."""
    scores = jnp.einsum("tnd,snd->nts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(valid, scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("nts,snd->tnd", weights, v)


QUERIES = 64
"""Patches whose scores against the whole picture are in memory at a time, at most."""
_ROWS = 1024
"""Rows of a part, at most, where the number of patches can be cut so."""

Projected = tuple[jax.Array, jax.Array, jax.Array]
"""Queries [N, heads, D], keys [heads, D, N] and values [heads, N, D] of a block that sees the whole picture."""


def rows_of_part(patches: int) -> int:
    """Rows of each part, of which there are a power of two."""
    rows = patches
    while rows > _ROWS and rows % 2 == 0:
        rows //= 2
    return rows


def through_blocks(patches: int, whole: Iterable[bool]) -> Iterator[EncoderStage]:
    """The stages from pixels to vectors; ``whole``: of each block, whether its patches see the whole picture."""
    yield EncoderStage("patches")
    for block, sees_all in enumerate(whole):
        if sees_all:
            yield EncoderStage("keys", block)
            yield from (EncoderStage("rows", block, part) for part in range(patches // rows_of_part(patches)))
        else:
            yield EncoderStage("window", block)
    yield EncoderStage("merge")


def hold(q: jax.Array, k: jax.Array, v: jax.Array) -> Projected:
    """Queries, keys and values [N, heads, D] of a block as its parts take them."""
    return q, k.transpose(1, 2, 0), v.transpose(1, 0, 2)


def see_all(held: Projected, part: jax.Array, valid: jax.Array) -> jax.Array:
    """What the queries of a part see of all patches that are ``valid`` [N]: [rows, heads * D]."""
    q, k, v = held
    rows = rows_of_part(len(q))
    bias = jnp.where(valid, 0.0, -1e30)

    def seen(queries: jax.Array) -> jax.Array:
        scores = jnp.einsum("tnd,nds->nts", queries, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        return jnp.einsum("nts,nsd->tnd", jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype), v)

    together = next(n for n in range(QUERIES, 0, -1) if rows % n == 0)
    queries = part_of(q, part).reshape(-1, together, *q.shape[1:])
    return jax.lax.map(seen, queries).reshape(rows, -1)


def part_of(state: jax.Array, part: jax.Array) -> jax.Array:
    """The rows of ``state`` [N, ...] that a part is about."""
    rows = rows_of_part(len(state))
    return jax.lax.dynamic_slice_in_dim(state, part * rows, rows)


def with_part(state: jax.Array, part: jax.Array, rows: jax.Array) -> jax.Array:
    """``state`` [N, H] with other rows where a part is."""
    return jax.lax.dynamic_update_slice_in_dim(state, rows, part * len(rows), 0)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float = 1e-6) -> jax.Array:
    """``x`` over its last axis: mean 0, deviation 1, then scaled and moved; float32 inside (Ba et al. 2016)."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight + bias).astype(x.dtype)


def declare_block(
    declare: Declare, hidden: int, inner: int, heads: int, qkv: Packing, qkv_bias: Packing = packing.flat
) -> Params:
    """A block of attention and a feed-forward without gates, a layer norm before each, all with biases.

    ``vision_qkv`` [H, 3, N, D], which checkpoints store as ``qkv`` says; ``vision_o`` [H, H], ``vision_up`` [H, I],
    ``vision_down`` [I, H], two norms.
    """
    shape, linear = (3, heads, hidden // heads), packing.transposed
    biases = {"o": hidden, "up": inner, "down": hidden, "norm": hidden, "mlp_norm": hidden}
    return {
        "vision_qkv": declare("vision_qkv", (hidden, *shape), (None,) * 4, "random", qkv),
        "vision_qkv_bias": declare("vision_qkv_bias", shape, (None,) * 3, "zeros", qkv_bias),
        "vision_o": declare("vision_o", (hidden, hidden), (None, None), "random", linear),
        "vision_up": declare("vision_up", (hidden, inner), (None, None), "random", linear),
        "vision_down": declare("vision_down", (inner, hidden), (None, None), "random", linear),
        "vision_norm": declare("vision_norm", (hidden,), (None,), "ones"),
        "vision_mlp_norm": declare("vision_mlp_norm", (hidden,), (None,), "ones"),
        **{f"vision_{n}_bias": declare(f"vision_{n}_bias", (size,), (None,), "zeros") for n, size in biases.items()},
    }


def block_cost(kind: str, patches: int, hidden: int, inner: int) -> int:
    """Multiplications of a stage of :func:`declare_block`, ``keys`` or ``rows``."""
    if kind == "keys":
        return patches * 3 * hidden * hidden
    return rows_of_part(patches) * hidden * (hidden + 2 * inner + 2 * patches)


def block_keys(
    block: Params, state: jax.Array, eps: float = 1e-6, turn: Callable[[jax.Array], jax.Array] = lambda part: part
) -> Projected:
    """What the parts of a block of :func:`declare_block` take of ``state`` [N, H].

    ``turn``: what positions do to queries and keys, [N, heads, D].
    """
    normed = layer_norm(state, block["vision_norm"], block["vision_norm_bias"], eps)
    rows = jnp.tensordot(normed, block["vision_qkv"], 1) + block["vision_qkv_bias"]
    return hold(turn(rows[:, 0]), turn(rows[:, 1]), rows[:, 2])


def block_rows(
    block: Params,
    state: jax.Array,
    held: Projected,
    part: jax.Array,
    valid: jax.Array,
    activation: str,
    eps: float = 1e-6,
) -> jax.Array:
    """``state`` [N, H] whose rows of ``part`` went through the block; each patch sees those that are ``valid``."""
    x = part_of(state, part) + see_all(held, part, valid) @ block["vision_o"] + block["vision_o_bias"]
    normed = layer_norm(x, block["vision_mlp_norm"], block["vision_mlp_norm_bias"], eps)
    inner = ACTIVATIONS[activation](normed @ block["vision_up"] + block["vision_up_bias"])
    return with_part(state, part, x + inner @ block["vision_down"] + block["vision_down_bias"])


def colour_values(mean: tuple[float, float, float], deviation: tuple[float, float, float]) -> NDArray[np.float32]:
    """What a byte of each colour becomes, as transformers' image processors have it: float32 [3, 256]."""
    share = (np.arange(256, dtype=np.uint8).astype(np.float64) * (1 / 255)).astype(np.float32)
    means, deviations = (np.array(each, np.float32)[:, None] for each in (mean, deviation))
    return (share - means) / deviations


def few(count: int) -> int:
    """A number from ``count`` on of which there are few, so that few programs compile: at most a third above."""
    power = 1 << (count - 1).bit_length()
    return next(n for n in (power * 5 // 8, power * 3 // 4, power) if n >= count)


def fewest(most: int) -> tuple[int, ...]:
    """All that :func:`few` gives for counts up to ``most``, ascending."""
    return tuple(sorted({few(count) for count in range(1, most + 1)}))


def blank(patches: int, side: int, vectors: int) -> Laid:
    """So many ``patches`` of padding, of ``side`` pixels, and ``vectors`` of it."""
    pixels = np.zeros((patches, 3, side, side), np.uint8)
    return Laid(pixels, np.zeros(patches, np.bool_), np.zeros((2, patches), np.int32), np.zeros(vectors, np.int32))


def convolution(packed: NDArray[Any]) -> Views:
    """One convolution ``[channels, frames, height, width, out]`` over patches; pictures alone may have no frames."""
    view = packed.transpose(packed.ndim - 1, *range(packed.ndim - 1))
    return [(view, view.shape)]
