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
    attend,
    few,
    fewest,
    hold,
    part_of,
    rows_of_part,
    see_all,
    through_blocks,
    with_part,
)
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
        return patches * (rows + 2 * self.heads * max(QUERIES, (self.window // self.patch) ** 2))

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

    def stages(self, patches: int) -> tuple[EncoderStage, ...]:
        """See ``Encoder``."""
        return tuple(through_blocks(patches, (i in self.full for i in range(self.depth))))

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
            return self.cost_around(kind, patches)
        hidden, rows = self.hidden_size, rows_of_part(patches)
        after = hidden + 3 * self.intermediate_size
        if kind == "keys":
            return patches * 3 * hidden * hidden
        if kind == "rows":
            return rows * hidden * (after + 2 * patches)
        return patches * hidden * (3 * hidden + after + 2 * (self.window // self.patch) ** 2)

    def stage(
        self, kind: str, params: Params, block: Params, state: jax.Array, held: Any, part: jax.Array, laid: Laid
    ) -> tuple[jax.Array, Any]:
        """See ``Encoder``: states are [N, H]."""
        if kind == "patches":
            return self.embedded(params, laid), ()
        if kind == "merge":
            return self.merged(params, _NORM(state, params["merge_norm"]), laid), ()
        if kind == "rows":
            seen = see_all(held, part, laid.valid)
            return with_part(state, part, self._after(block, part_of(state, part), seen)), held
        rows = jnp.tensordot(_NORM(state, block["vision_norm"]), block["vision_qkv"], 1) + block["vision_qkv_bias"]
        q, k, v = self.turned(rows[:, 0], laid), self.turned(rows[:, 1], laid), rows[:, 2]
        if kind == "keys":
            return state, hold(q, k, v)
        by_window = (-1, (self.window // self.patch) ** 2)
        parts = (each.reshape(*by_window, *each.shape[1:]) for each in (q, k, v))
        seen = jax.vmap(attend)(*parts, laid.valid.reshape(by_window)).reshape(state.shape)
        return self._after(block, state, seen), ()

    def _after(self, block: Params, rows: jax.Array, seen: jax.Array) -> jax.Array:
        """``rows`` of a state after the rest of a block, both [T, H]."""
        x = rows + seen @ block["vision_o"] + block["vision_o_bias"]
        inner = jnp.tensordot(_NORM(x, block["vision_mlp_norm"]), block["vision_gate_up"], 1)
        inner = inner + block["vision_gate_up_bias"]
        inner = ACTIVATIONS[self.activation](inner[:, 0]) * inner[:, 1]
        return x + inner @ block["vision_down"] + block["vision_down_bias"]
