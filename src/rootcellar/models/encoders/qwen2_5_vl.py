"""Qwen2.5-VL's encoder: a transformer over patches, which sees windows in most blocks and the whole picture in a few.

Bai et al. 2025 (Qwen2.5-VL Technical Report); names and arithmetic follow transformers' ``modeling_qwen2_5_vl``.

Patches lie window by window, each window padded to its full size, so that attention inside windows is one product of
small matrices and no index. 2 by 2 patches become one vector. A still picture is two equal frames::

    patches   [ window 0 .... | window 1 .. pad | ... | windows of padding ]      windows: few counts, so few programs
    window    [ unit | unit | ... ]                                               unit: the 2 x 2 patches of a vector
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
from rootcellar.models.encoders.parts import attend, few, fewest
from rootcellar.models.encoders.qwen_pictures import THINNEST, QwenPictures
from rootcellar.models.feed_forward.activations import ACTIVATIONS
from rootcellar.models.norms import Norm
from rootcellar.models.spec import Declare, Params

_NORM = Norm(1e-6)


@dataclass(frozen=True, kw_only=True)
class Qwen25Vision(QwenPictures):
    """See above. ``full``: the blocks that see the whole picture; ``window``: pixels of a window's side."""

    window: int = 112
    full: tuple[int, ...] = (7, 15, 23, 31)
    activation: str = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window % (self.patch * self.merge):
            raise ModelError(
                f"vision_config: window_size={self.window} must be a multiple of patch_size * spatial_merge_size = "
                f"{self.patch * self.merge}"
            )

    # -- as the stages take it ---------------------------------------------------------------------------------------

    def length(self, prepared: NDArray[np.uint8]) -> int:
        """See ``Encoder``."""
        windows = math.prod(-(-n // self.window) for n in prepared.shape[:2])
        return few(windows) * (self.window // self.patch) ** 2

    @property
    def lengths(self) -> tuple[int, ...]:
        """See ``Encoder``: of a thin picture each window may be part empty."""
        most, size = math.ceil(self.most / self.window**2), (self.window // self.patch) ** 2
        thin = most + math.ceil(2 * math.sqrt(THINNEST * self.most) / self.window) + 1
        return tuple(size * n for n in {**dict.fromkeys(fewest(most)), few(thin): None})

    def workspace(self, patches: int) -> int:
        """See ``Encoder``."""
        rows = 8 * self.hidden_size + 3 * self.intermediate_size + 3 * self.patch**2
        return patches * (rows + 2 * self.heads * (self.window // self.patch) ** 2)

    def lay(self, prepared: NDArray[np.uint8]) -> Laid:
        """See ``Encoder``."""
        units, side, merge = self.units(prepared), self.window // self.unit, self.merge
        rows, columns = units.shape[:2]
        windows = -(-rows // side), -(-columns // side)
        count = self.length(prepared) // (side * merge) ** 2
        index = np.full((windows[0] * side, windows[1] * side), -1)
        index[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        index = index.reshape(windows[0], side, windows[1], side).transpose(0, 2, 1, 3).reshape(-1)
        index = np.pad(index, (0, count * side**2 - len(index)), constant_values=-1)
        valid = index >= 0
        order = np.zeros(len(index), np.int32)
        order[index[valid]] = np.flatnonzero(valid)
        patches = units.reshape(-1, *units.shape[2:])[np.where(valid, index, 0)]
        patches = patches.reshape(-1, *units.shape[3:])
        return Laid(patches, np.repeat(valid, merge**2), self.at(np.where(valid, index, 0), columns), order)

    # -- the model -------------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> tuple[str, ...]:
        """See ``Encoder``."""
        return ("patches", *("full" if i in self.full else "window" for i in range(self.depth)), "merge")

    def declare_block(self, declare: Declare) -> Params:
        """``vision_qkv`` [H, 3, N, D], ``vision_o`` [H, H], ``vision_gate_up`` [H, 2, I], ``vision_down`` [I, H], their
        biases, and two norms.
        """  # fmt: skip
        hidden, inner = self.hidden_size, self.intermediate_size
        qkv = (3, self.heads, hidden // self.heads)
        return {
            "vision_qkv": declare("vision_qkv", (hidden, *qkv), (None,) * 4, "random", packing.transposed),
            "vision_qkv_bias": declare("vision_qkv_bias", qkv, (None,) * 3, "zeros", packing.flat),
            "vision_o": declare("vision_o", (hidden, hidden), (None, None), "random", packing.transposed),
            "vision_o_bias": declare("vision_o_bias", (hidden,), (None,), "zeros"),
            "vision_gate_up": declare(
                "vision_gate_up", (hidden, 2, inner), (None,) * 3, "random", packing.beside
            ),
            "vision_gate_up_bias": declare(
                "vision_gate_up_bias", (2, inner), (None,) * 2, "zeros", packing.beside_bias
            ),
            "vision_down": declare("vision_down", (inner, hidden), (None, None), "random", packing.transposed),
            "vision_down_bias": declare("vision_down_bias", (hidden,), (None,), "zeros"),
            "vision_norm": declare("vision_norm", (hidden,), (None,), "ones"),
            "vision_mlp_norm": declare("vision_mlp_norm", (hidden,), (None,), "ones"),
        }  # fmt: skip

    def cost(self, kind: str, patches: int) -> int:
        """See ``Encoder``."""
        if kind in ("patches", "merge"):
            return self.cost_around(kind)
        hidden = self.hidden_size
        seen = patches if kind == "full" else (self.window // self.patch) ** 2
        return hidden * (4 * hidden + 3 * self.intermediate_size + 2 * seen)

    def stage(self, kind: str, params: Params, block: Params, state: jax.Array, laid: Laid) -> jax.Array:
        """See ``Encoder``: states are [N, H]."""
        if kind == "patches":
            return self.embedded(params, laid)
        if kind == "merge":
            return self.merged(params, _NORM(state, params["merge_norm"]), laid)
        x = state + self._attend(kind, block, _NORM(state, block["vision_norm"]), laid)
        rows = jnp.tensordot(_NORM(x, block["vision_mlp_norm"]), block["vision_gate_up"], 1)
        rows = rows + block["vision_gate_up_bias"]
        inner = ACTIVATIONS[self.activation](rows[:, 0]) * rows[:, 1]
        return x + inner @ block["vision_down"] + block["vision_down_bias"]

    def _attend(self, kind: str, block: Params, x: jax.Array, laid: Laid) -> jax.Array:
        dim, size = self.hidden_size // self.heads, (self.window // self.patch) ** 2
        rows = jnp.tensordot(x, block["vision_qkv"], 1) + block["vision_qkv_bias"]
        q, k = (self.turned(rows[:, i], laid) for i in range(2))
        parts = [each.reshape(-1, size, self.heads, dim) for each in (q, k, rows[:, 2])]
        valid = laid.valid.reshape(-1, size)
        if kind == "window":
            out = jax.vmap(attend)(*parts, valid)
        else:  # a window's queries at a time, so that scores of all pairs are never in memory
            out = jax.lax.map(lambda queries: attend(queries, k, rows[:, 2], laid.valid), parts[0])
        return out.reshape(x.shape) @ block["vision_o"] + block["vision_o_bias"]
