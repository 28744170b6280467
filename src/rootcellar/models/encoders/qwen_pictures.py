"""Pictures as Qwen's models from 2-VL on take them: resized to whole units, cut into patches, some to a vector.

And what their encoders begin and end with.

Equal to transformers' ``Qwen2VLImageProcessor`` (its Pillow backend), bit for bit. A still picture is two equal frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rootcellar.errors import ModelError, RequestError
from rootcellar.models import packing
from rootcellar.models.encoders.encoder import Laid
from rootcellar.models.encoders.parts import blank, colour_values, convolution
from rootcellar.models.rope import rotate
from rootcellar.models.spec import Declare, Params

THINNEST = 200
"""Times as long as wide that a picture may be, at most."""


@dataclass(frozen=True, kw_only=True)
class QwenPictures:
    """``merge`` by ``merge`` patches of ``patch`` pixels are a unit, which becomes one vector; ``frames``: see above.

    ``least``, ``most``: pixels that a picture is resized to have; ``mean``, ``deviation``: of each colour, from 0 to 1.
    ``token``: what stands in a prompt where a picture is to be.
    """

    token: int
    depth: int
    hidden_size: int
    intermediate_size: int
    heads: int
    patch: int = 14
    merge: int = 2
    frames: int = 2
    least: int = 56 * 56
    most: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    deviation: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.heads):
            raise ModelError(
                f"vision_config: hidden_size={self.hidden_size} must be a multiple of 4 * num_heads={4 * self.heads}"
            )

    @property
    def atomic(self) -> bool:
        """See ``Encoder``."""
        return False

    @property
    def unit(self) -> int:
        """Pixels of the side of what becomes one vector."""
        return self.patch * self.merge

    def prepare(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See ``Encoder``: sides are multiples of a unit, and there are ``least`` to ``most`` pixels."""
        height, width = pixels.shape[:2]
        target = self._resized(height, width)
        if target == (height, width):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if max(height, width) > THINNEST * min(height, width):
            raise RequestError(
                f"an image of {width} x {height} pixels is too thin: one side may be {THINNEST} times as long as the "
                "other, at most"
            )
        unit = self.unit
        tall, wide = (round(side / unit) * unit for side in (height, width))
        if tall * wide > self.most:
            shrink = math.sqrt(height * width / self.most)
            tall, wide = (max(unit, math.floor(n / shrink / unit) * unit) for n in (height, width))
            return tall, wide
        if tall * wide < self.least:
            grow = math.sqrt(self.least / (height * width))
            return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
        return tall, wide

    @property
    def values(self) -> NDArray[np.float32]:
        """What a byte of each colour becomes: float32 [3, 256]."""
        return colour_values(self.mean, self.deviation)

    def pixel_values(self, prepared: NDArray[np.uint8]) -> NDArray[np.float32]:
        """A prepared picture as transformers hands it to the model: float32 [patches, values]."""
        units = self.units(prepared)
        values = np.take_along_axis(
            self.values[:, :, None], units.reshape(-1, 3, self.patch**2).transpose(1, 2, 0).reshape(3, -1, 1), 1
        )
        values = values.reshape(3, self.patch**2, -1).transpose(2, 0, 1)[:, :, None]
        return np.broadcast_to(values, (len(values), 3, self.frames, self.patch**2)).reshape(len(values), -1)

    def units(self, prepared: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [rows, columns, patches of a unit, 3, patch, patch]."""
        side, merge = self.patch, self.merge
        rows, columns = (n // self.unit for n in prepared.shape[:2])
        cut = prepared.reshape(rows, merge, side, columns, merge, side, 3)
        return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows, columns, merge**2, 3, side, side)

    def at(self, unit: NDArray[np.integer], columns: int) -> NDArray[np.int32]:
        """Row and column of each patch of these units of a picture of so many ``columns`` of them, int32 [2, N]."""
        merge = self.merge
        inside = np.repeat(np.arange(merge), merge), np.tile(np.arange(merge), merge)
        pairs = zip(np.divmod(unit, columns), inside, strict=True)
        return np.stack([(n[:, None] * merge + part).reshape(-1) for n, part in pairs]).astype(np.int32)

    def blank(self, patches: int) -> Laid:
        """See ``Encoder``."""
        return blank(patches, self.patch, patches // self.merge**2)

    def size(self, prepared: NDArray[np.uint8]) -> int:
        """See ``Encoder``."""
        return math.prod(n // self.unit for n in prepared.shape[:2])

    def places(self, prepared: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
        """See ``Encoder``: all at one time; the next token comes after the longer side."""
        rows, columns = (n // self.unit for n in prepared.shape[:2])
        down, across = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        return np.stack([0 * down, down, across]).reshape(3, -1).astype(np.int32), max(rows, columns)

    # -- what both encoders begin and end with ---------------------------------------------------------------------

    def declare(self, declare: Declare, embed: int) -> Params:
        """``patch`` [3, F, P, P, H]; ``merge_norm`` [H]; ``merge_in``, ``merge_out``: two linear layers with biases."""
        hidden, wide, linear = self.hidden_size, self.hidden_size * self.merge**2, packing.transposed
        shape = (3, self.frames, self.patch, self.patch, hidden)
        return {
            "patch": declare("patch", shape, (None,) * 5, "random", convolution),
            "merge_norm": declare("merge_norm", (hidden,), (None,), "ones"),
            "merge_in": declare("merge_in", (wide, wide), (None, None), "random", linear),
            "merge_in_bias": declare("merge_in_bias", (wide,), (None,), "zeros"),
            "merge_out": declare("merge_out", (wide, embed), (None, None), "random", linear),
            "merge_out_bias": declare("merge_out_bias", (embed,), (None,), "zeros"),
        }

    def cost_around(self, kind: str, patches: int) -> int:
        """Multiplications of the first stage, ``patches``, or of the last."""
        each = 3 * self.patch**2 if kind == "patches" else (self.merge**2 + 1) * self.hidden_size
        return patches * each * self.hidden_size

    def embedded(self, params: Params, laid: Laid) -> jax.Array:
        """Patches as vectors, [N, H]: both frames are the picture, so the convolution's weights are summed."""
        weight = params["patch"]
        values = jnp.asarray(self.values)[jnp.arange(3)[:, None, None], laid.patches]
        return jnp.einsum("ncij,cijh->nh", values.astype(weight.dtype), weight.sum(1))

    def merged(self, params: Params, normed: jax.Array, laid: Laid) -> jax.Array:
        """The vectors, [M, E], of patches [N, H] in their order there."""
        units = normed.reshape(-1, self.hidden_size * self.merge**2)
        inner = jax.nn.gelu(units @ params["merge_in"] + params["merge_in_bias"], approximate=False)
        return (inner @ params["merge_out"] + params["merge_out_bias"])[laid.order]

    def turned(self, part: jax.Array, laid: Laid) -> jax.Array:
        """Queries or keys [N, heads, D] by their places: half of the pairs by the row, half by the column."""
        dim = self.hidden_size // self.heads
        frequencies = 1 / self.theta ** (np.arange(0, dim // 2, 2, dtype=np.float32) / (dim // 2))
        angles = (laid.at[:, :, None] * frequencies.astype(np.float32)).transpose(1, 0, 2).reshape(len(part), -1)
        return rotate(part, jnp.cos(angles), jnp.sin(angles))
