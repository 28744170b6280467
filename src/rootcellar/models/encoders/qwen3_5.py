"""Qwen3.5's encoder: a transformer over patches that see the whole picture, with learned places beside turned ones.

Names and arithmetic follow transformers' ``modeling_qwen3_5`` (Qwen3-VL's encoder without its deep stack). The learned
places are a square grid, stretched over a picture of any size: each patch has a mean of the four that lie around it.
Patches lie unit by unit; 2 by 2 of them become one vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.encoders.encoder import Laid
from rootcellar.models.encoders.parts import attend, convolution, few, fewest, layer_norm
from rootcellar.models.encoders.qwen_pictures import QwenPictures
from rootcellar.models.feed_forward.activations import ACTIVATIONS
from rootcellar.models.rope import rotate
from rootcellar.models.spec import Declare, Params

_QUERIES = 64
"""Patches whose scores are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Qwen35Vision(QwenPictures):
    """See above. ``grid``: learned places of a side."""

    depth: int
    hidden_size: int
    intermediate_size: int
    heads: int
    grid: int = 48
    activation: str = "gelu_pytorch_tanh"
    theta: float = 10000.0
    patch: int = 16
    least: int = 256 * 256
    most: int = 4096 * 4096
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.heads):
            raise ModelError(
                f"vision_config: hidden_size={self.hidden_size} must be a multiple of 4 * num_heads={4 * self.heads}"
            )
        if _QUERIES % self.merge**2:
            raise ModelError(
                f"vision_config: spatial_merge_size={self.merge} is not supported: it must be 1, 2, 4 or 8"
            )

    # -- as the stages take it ---------------------------------------------------------------------------------------

    def length(self, prepared: NDArray[np.uint8]) -> int:
        """See ``Encoder``."""
        return few(-(-self.size(prepared) * self.merge**2 // _QUERIES)) * _QUERIES

    @property
    def lengths(self) -> tuple[int, ...]:
        """See ``Encoder``."""
        return tuple(_QUERIES * n for n in fewest(-(-self.most // (_QUERIES * self.patch**2))))

    def workspace(self, patches: int) -> int:
        """See ``Encoder``."""
        rows = 8 * self.hidden_size + 2 * self.intermediate_size + 3 * self.patch**2
        return patches * (rows + 2 * self.heads * _QUERIES)

    def lay(self, prepared: NDArray[np.uint8]) -> Laid:
        """See ``Encoder``."""
        units, merge = self.units(prepared), self.merge
        rows, columns = units.shape[:2]
        count, padding = rows * columns, self.length(prepared) - rows * columns * merge**2
        row, column = np.divmod(np.arange(count), columns)
        inside = np.repeat(np.arange(merge), merge), np.tile(np.arange(merge), merge)
        at = np.stack([(n[:, None] * merge + part).reshape(-1) for n, part in zip((row, column), inside, strict=True)])
        patches = units.reshape(-1, *units.shape[3:])
        return Laid(
            np.pad(patches, ((0, padding), *((0, 0),) * 3)),
            np.arange(len(patches) + padding) < len(patches),
            np.pad(at, ((0, 0), (0, padding))).astype(np.int32),
            np.pad(np.arange(count, dtype=np.int32), (0, padding // merge**2)),
        )

    # -- the model -------------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> tuple[str, ...]:
        """See ``Encoder``."""
        return ("patches", *("block",) * self.depth, "merge")

    def block_of(self, stage: int) -> int | None:
        """See ``Encoder``."""
        return stage - 1 if 1 <= stage <= self.depth else None

    def declare(self, declare: Declare, embed: int) -> Params:
        """``patch`` [3, F, P, P, H]; ``places`` [grid ** 2, H]; ``merge_norm`` [H]; ``merge_in``, ``merge_out``: two
        linear layers; and biases.
        """  # fmt: skip
        hidden, wide, linear = self.hidden_size, self.hidden_size * self.merge**2, packing.transposed
        shape = (3, self.frames, self.patch, self.patch, hidden)
        return {
            "patch": declare("patch", shape, (None,) * 5, "random", convolution),
            "patch_bias": declare("patch_bias", (hidden,), (None,), "zeros"),
            "places": declare("places", (self.grid**2, hidden), (None, None), "random"),
            "merge_norm": declare("merge_norm", (hidden,), (None,), "ones"),
            "merge_norm_bias": declare("merge_norm_bias", (hidden,), (None,), "zeros"),
            "merge_in": declare("merge_in", (wide, wide), (None, None), "random", linear),
            "merge_in_bias": declare("merge_in_bias", (wide,), (None,), "zeros"),
            "merge_out": declare("merge_out", (wide, embed), (None, None), "random", linear),
            "merge_out_bias": declare("merge_out_bias", (embed,), (None,), "zeros"),
        }

    def declare_block(self, declare: Declare) -> Params:
        """``vision_qkv`` [H, 3, N, D], ``vision_o`` [H, H], ``vision_up`` [H, I], ``vision_down`` [I, H], two norms;
        all with biases.
        """  # fmt: skip
        hidden, inner, linear = self.hidden_size, self.intermediate_size, packing.transposed
        qkv = (3, self.heads, hidden // self.heads)
        vectors = {
            "o_bias": hidden,
            "up_bias": inner,
            "down_bias": hidden,
            "norm_bias": hidden,
            "mlp_norm_bias": hidden,
        }
        return {
            "vision_qkv": declare("vision_qkv", (hidden, *qkv), (None,) * 4, "random", linear),
            "vision_qkv_bias": declare("vision_qkv_bias", qkv, (None,) * 3, "zeros", packing.flat),
            "vision_o": declare("vision_o", (hidden, hidden), (None, None), "random", linear),
            "vision_up": declare("vision_up", (hidden, inner), (None, None), "random", linear),
            "vision_down": declare("vision_down", (inner, hidden), (None, None), "random", linear),
            "vision_norm": declare("vision_norm", (hidden,), (None,), "ones"),
            "vision_mlp_norm": declare("vision_mlp_norm", (hidden,), (None,), "ones"),
            **{f"vision_{name}": declare(f"vision_{name}", (n,), (None,), "zeros") for name, n in vectors.items()},
        }

    def cost(self, kind: str, patches: int) -> int:
        """See ``Encoder``."""
        hidden, merged = self.hidden_size, self.merge**2
        if kind == "patches":
            return 3 * self.patch**2 * hidden
        if kind == "merge":
            return merged * hidden * hidden + hidden * hidden
        return hidden * (4 * hidden + 2 * self.intermediate_size + 2 * patches)

    def stage(self, kind: str, params: Params, block: Params, state: jax.Array, laid: Laid) -> jax.Array:
        """See ``Encoder``: states are [N, H]."""
        if kind == "patches":
            weight = params["patch"]
            values = jnp.asarray(self.values)[jnp.arange(3)[:, None, None], laid.patches]
            rows = jnp.einsum("ncij,cijh->nh", values.astype(weight.dtype), weight.sum(1)) + params["patch_bias"]
            return rows + self._places(params["places"], laid)
        if kind == "merge":
            normed = layer_norm(state, params["merge_norm"], params["merge_norm_bias"])
            units = normed.reshape(-1, self.hidden_size * self.merge**2)
            inner = jax.nn.gelu(units @ params["merge_in"] + params["merge_in_bias"], approximate=False)
            return (inner @ params["merge_out"] + params["merge_out_bias"])[laid.order]
        normed = layer_norm(state, block["vision_norm"], block["vision_norm_bias"])
        x = state + self._attend(block, normed, laid)
        normed = layer_norm(x, block["vision_mlp_norm"], block["vision_mlp_norm_bias"])
        inner = ACTIVATIONS[self.activation](normed @ block["vision_up"] + block["vision_up_bias"])
        return x + inner @ block["vision_down"] + block["vision_down_bias"]

    def _places(self, learned: jax.Array, laid: Laid) -> jax.Array:
        """The learned place of each patch, [N, H]: the grid's corners are the picture's."""
        sizes = jnp.max(jnp.where(laid.valid, laid.at, 0), axis=1, keepdims=True) + 1
        exact = laid.at.astype(jnp.float32) * (self.grid - 1) / jnp.maximum(sizes - 1, 1)
        whole = jnp.floor(exact)
        near = jnp.clip(whole.astype(jnp.int32)[..., None] + jnp.arange(2), 0, self.grid - 1)  # [2, N, 2]
        shares = jnp.stack([1 - (exact - whole), exact - whole], axis=-1)
        index = near[0, :, :, None] * self.grid + near[1, :, None, :]
        weights = (shares[0, :, :, None] * shares[1, :, None, :]).astype(learned.dtype)
        return jnp.einsum("nij,nijh->nh", weights, learned[index])

    def _attend(self, block: Params, x: jax.Array, laid: Laid) -> jax.Array:
        dim = self.hidden_size // self.heads
        frequencies = 1 / self.theta ** (np.arange(0, dim // 2, 2, dtype=np.float32) / (dim // 2))
        angles = (laid.at[:, :, None] * frequencies.astype(np.float32)).transpose(1, 0, 2).reshape(len(x), -1)
        rows = jnp.tensordot(x, block["vision_qkv"], 1) + block["vision_qkv_bias"]
        q, k = (rotate(rows[:, i], jnp.cos(angles), jnp.sin(angles)) for i in range(2))
        parts = q.reshape(-1, _QUERIES, self.heads, dim)  # so that scores of all pairs are never in memory
        out = jax.lax.map(lambda queries: attend(queries, k, rows[:, 2], laid.valid), parts)
        return out.reshape(x.shape) @ block["vision_o"] + block["vision_o_bias"]


def side_of(places: int) -> int:
    """The side of a square grid of so many learned places; ``ModelError`` where it is none."""
    side = math.isqrt(places)
    if side * side != places:
        raise ModelError(f"vision_config.num_position_embeddings={places} is no square of a whole number")
    return side
