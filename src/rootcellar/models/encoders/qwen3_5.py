"""Qwen3.5's encoder: a transformer over patches that see the whole picture, with learned places beside turned ones.

Names and arithmetic follow transformers' ``modeling_qwen3_5`` (Qwen3-VL's encoder without its deep stack). The learned
places are a square grid, stretched over a picture of any size: each patch has a mean of the four that lie around it.
Patches lie unit by unit; 2 by 2 of them become one vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.encoders.encoder import EncoderStage, Laid
from rootcellar.models.encoders.parts import (
    QUERIES,
    block_cost,
    block_keys,
    block_rows,
    declare_block,
    few,
    fewest,
    layer_norm,
    through_blocks,
)
from rootcellar.models.encoders.qwen_pictures import QwenPictures
from rootcellar.models.spec import Declare, Params


@dataclass(frozen=True, kw_only=True)
class Qwen35Vision(QwenPictures):
    """See above. ``grid``: learned places of a side."""

    grid: int = 48
    activation: str = "gelu_pytorch_tanh"
    patch: int = 16
    least: int = 256 * 256
    most: int = 4096 * 4096
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if QUERIES % self.merge**2:
            raise ModelError(
                f"vision_config: spatial_merge_size={self.merge} is not supported: it must be 1, 2, 4 or 8"
            )

    # -- as the stages take it ---------------------------------------------------------------------------------------

    def length(self, prepared: NDArray[np.uint8]) -> int:
        """See ``Encoder``."""
        return few(-(-self.size(prepared) * self.merge**2 // QUERIES)) * QUERIES

    @property
    def lengths(self) -> tuple[int, ...]:
        """See ``Encoder``."""
        return tuple(QUERIES * n for n in fewest(-(-self.most // (QUERIES * self.patch**2))))

    def workspace(self, patches: int) -> int:
        """See ``Encoder``."""
        rows = 8 * self.hidden_size + 2 * self.intermediate_size + 3 * self.patch**2
        return patches * (rows + 2 * self.heads * QUERIES)

    def lay(self, prepared: NDArray[np.uint8]) -> Laid:
        """See ``Encoder``."""
        units, merge = self.units(prepared), self.merge
        rows, columns = units.shape[:2]
        count, padding = rows * columns, self.length(prepared) - rows * columns * merge**2
        patches = units.reshape(-1, *units.shape[3:])
        return Laid(
            np.pad(patches, ((0, padding), *((0, 0),) * 3)),
            np.arange(len(patches) + padding) < len(patches),
            np.pad(self.at(np.arange(count), columns), ((0, 0), (0, padding))),
            np.pad(np.arange(count, dtype=np.int32), (0, padding // merge**2)),
        )

    # -- the model -------------------------------------------------------------------------------------------------

    def stages(self, patches: int) -> tuple[EncoderStage, ...]:
        """See ``Encoder``."""
        return tuple(through_blocks(patches, (True,) * self.depth))

    def declare(self, declare: Declare, embed: int) -> Params:
        """Beside Qwen's ``places`` [grid ** 2, H] and biases of ``patch`` and ``merge_norm``."""
        hidden = self.hidden_size
        return {
            **super().declare(declare, embed),
            "patch_bias": declare("patch_bias", (hidden,), (None,), "zeros"),
            "places": declare("places", (self.grid**2, hidden), (None, None), "random"),
            "merge_norm_bias": declare("merge_norm_bias", (hidden,), (None,), "zeros"),
        }

    def declare_block(self, declare: Declare) -> Params:
        """See ``parts.declare_block``."""
        return declare_block(declare, self.hidden_size, self.intermediate_size, self.heads, packing.transposed)

    def cost(self, kind: str, patches: int) -> int:
        """See ``Encoder``."""
        if kind in ("patches", "merge"):
            return self.cost_around(kind, patches)
        return block_cost(kind, patches, self.hidden_size, self.intermediate_size)

    def stage(
        self, kind: str, params: Params, block: Params, state: jax.Array, held: Any, part: jax.Array, laid: Laid
    ) -> tuple[jax.Array, Any]:
        """See ``Encoder``: states are [N, H]."""
        if kind == "patches":
            return self.embedded(params, laid) + params["patch_bias"] + self._places(params["places"], laid), ()
        if kind == "merge":
            return self.merged(params, layer_norm(state, params["merge_norm"], params["merge_norm_bias"]), laid), ()
        if kind == "keys":
            return state, block_keys(block, state, turn=partial(self.turned, laid=laid))
        return block_rows(block, state, held, part, laid.valid, self.activation), held

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


def side_of(places: int) -> int:
    """The side of a square grid of so many learned places; ``ModelError`` where it is none."""
    side = math.isqrt(places)
    if side * side != places:
        raise ModelError(f"vision_config.num_position_embeddings={places} is no square of a whole number")
    return side
