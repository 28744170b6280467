"""Gemma 3's encoder: SigLIP (Zhai et al. 2023) over pictures of one size, a vector for each square of its patches.

Names and arithmetic follow transformers' ``modeling_siglip`` and ``Gemma3MultiModalProjector``. The language model sees
a picture in both directions, so pictures are ``atomic``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.encoders.encoder import EncoderStage, Laid
from rootcellar.models.encoders.parts import (
    QUERIES,
    blank,
    block_cost,
    block_keys,
    block_rows,
    colour_values,
    convolution,
    declare_block,
    layer_norm,
    through_blocks,
)
from rootcellar.models.norms import Norm
from rootcellar.models.spec import Declare, Params


@dataclass(frozen=True, kw_only=True)
class Gemma3Vision:
    """See above. ``side``: pixels of a picture's, whatever it was before; ``tokens``: vectors of a picture's side."""

    token: int
    depth: int
    hidden_size: int
    intermediate_size: int
    heads: int
    side: int = 896
    patch: int = 14
    tokens: int = 16
    activation: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    deviation: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ModelError(
                f"vision_config: hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.heads}"
            )
        if self.side % self.patch or self._patches % self.tokens:
            raise ModelError(
                f"vision_config: image_size={self.side} must be whole patches of {self.patch} pixels, and these a "
                f"multiple of the root of mm_tokens_per_image, {self.tokens}"
            )

    @property
    def _patches(self) -> int:
        """Patches of a side."""
        return self.side // self.patch

    # -- preprocessing: equal to transformers' Gemma3ImageProcessor without pan and scan, bit for bit ----------------

    @property
    def atomic(self) -> bool:
        """See ``Encoder``."""
        return True

    def prepare(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See ``Encoder``: a square, however long the picture is."""
        if pixels.shape[:2] == (self.side, self.side):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.BILINEAR))

    def pixel_values(self, prepared: NDArray[np.uint8]) -> NDArray[np.float32]:
        """A prepared picture as transformers hands it to the model: float32 [3, side, side]."""
        return colour_values(self.mean, self.deviation)[np.arange(3)[:, None, None], prepared.transpose(2, 0, 1)]

    def size(self, prepared: NDArray[np.uint8]) -> int:  # noqa: ARG002 - all have as many
        """See ``Encoder``."""
        return self.tokens**2

    def places(self, prepared: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
        """See ``Encoder``: this model knows no places but positions."""
        return np.tile(np.arange(self.size(prepared), dtype=np.int32), (3, 1)), self.size(prepared)

    def length(self, prepared: NDArray[np.uint8]) -> int:  # noqa: ARG002
        """See ``Encoder``."""
        return self._patches**2

    @property
    def lengths(self) -> tuple[int, ...]:
        """See ``Encoder``: all pictures have as many."""
        return (self._patches**2,)

    def workspace(self, patches: int) -> int:
        """See ``Encoder``."""
        rows = 8 * self.hidden_size + 2 * self.intermediate_size + 3 * self.patch**2
        return patches * (rows + 2 * self.heads * QUERIES)

    def lay(self, prepared: NDArray[np.uint8]) -> Laid:
        """See ``Encoder``: row by row."""
        side, patch = self._patches, self.patch
        cut = prepared.reshape(side, patch, side, patch, 3).transpose(0, 2, 4, 1, 3)
        at = np.stack(np.divmod(np.arange(side**2, dtype=np.int32), np.int32(side)))
        order = np.arange(self.tokens**2, dtype=np.int32)
        return Laid(np.ascontiguousarray(cut.reshape(-1, *cut.shape[2:])), np.ones(side**2, np.bool_), at, order)

    def blank(self, patches: int) -> Laid:
        """See ``Encoder``."""
        return blank(patches, self.patch, self.tokens**2)

    # -- the model -------------------------------------------------------------------------------------------------

    def stages(self, patches: int) -> tuple[EncoderStage, ...]:
        """See ``Encoder``."""
        return tuple(through_blocks(patches, (True,) * self.depth))

    def declare(self, declare: Declare, embed: int) -> Params:
        """``patch`` [3, P, P, H]; ``places`` [N, H]; ``vision_last_norm``, ``merge_norm`` [H]; ``merge`` [H, E]."""
        hidden, shape = self.hidden_size, (3, self.patch, self.patch, self.hidden_size)
        return {
            "patch": declare("patch", shape, (None,) * 4, "random", convolution),
            "patch_bias": declare("patch_bias", (hidden,), (None,), "zeros"),
            "places": declare("places", (self._patches**2, hidden), (None, None), "random"),
            "vision_last_norm": declare("vision_last_norm", (hidden,), (None,), "ones"),
            "vision_last_norm_bias": declare("vision_last_norm_bias", (hidden,), (None,), "zeros"),
            "merge_norm": declare("merge_norm", (hidden,), (None,), "zeros"),
            "merge": declare("merge", (hidden, embed), (None, None), "random"),
        }

    def declare_block(self, declare: Declare) -> Params:
        """See ``parts.declare_block``."""
        sizes = self.hidden_size, self.intermediate_size, self.heads
        return declare_block(declare, *sizes, packing.beside, packing.beside_bias)

    def cost(self, kind: str, patches: int) -> int:
        """See ``Encoder``."""
        if kind in ("patches", "merge"):
            return patches * self.hidden_size * (3 * self.patch**2 if kind == "patches" else 1)
        return block_cost(kind, patches, self.hidden_size, self.intermediate_size)

    def stage(
        self, kind: str, params: Params, block: Params, state: jax.Array, held: Any, part: jax.Array, laid: Laid
    ) -> tuple[jax.Array, Any]:
        """See ``Encoder``: states are [N, H]."""
        if kind == "patches":
            values = jnp.asarray(colour_values(self.mean, self.deviation))[jnp.arange(3)[:, None, None], laid.patches]
            rows = jnp.einsum("ncij,cijh->nh", values.astype(params["patch"].dtype), params["patch"])
            return rows + params["patch_bias"] + params["places"], ()
        if kind == "merge":
            normed = layer_norm(state, params["vision_last_norm"], params["vision_last_norm_bias"], self.eps)
            square = self._patches // self.tokens
            pooled = normed.reshape(self.tokens, square, self.tokens, square, -1).mean((1, 3))
            pooled = Norm(self.eps, offset=1.0)(pooled.reshape(self.tokens**2, -1), params["merge_norm"])
            return pooled @ params["merge"], ()
        if kind == "keys":
            return state, block_keys(block, state, self.eps)
        return block_rows(block, state, held, part, laid.valid, self.activation, self.eps), held
