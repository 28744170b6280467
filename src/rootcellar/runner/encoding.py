"""Running an encoder of pictures: several at a time, a stage after the other, so that steps may come between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.models.encoders import Encoder, Laid
from rootcellar.models.spec import Params
from rootcellar.runner.placement import Placement
from rootcellar.runner.runner import Program

TOGETHER = 8
"""Most pictures that are encoded together, all of one shape."""
_SEVERAL = 8192
"""Patches that are encoded together, at least, where the longest picture has fewer."""


def most_patches(encoder: Encoder) -> int:
    """Most patches that are encoded together: those of the longest picture, or of several short ones."""
    return max(encoder.lengths[-1], _SEVERAL)


@dataclass
class Encoding:
    """Pictures on their way through an encoder: ``count`` of them, laid and padded to a power of two, all [B, ...].

    ``stage``: the next one; after the last ``state`` has the vectors, [B, M, E].
    """

    laid: Laid
    count: int
    state: Array
    stage: int = 0


class PictureEncoder:
    """The encoder of a model as it is placed. Its programs compile when they first run, or in ``each_program``."""

    def __init__(self, encoder: Encoder, placement: Placement) -> None:
        self.encoder = encoder
        self._placement = placement

    def begin(self, pixels: Sequence[NDArray[np.uint8]]) -> Encoding:
        """Begin with prepared pictures, uint8 [height, width, 3], that go together."""
        same = [self.encoder.lay(each) for each in pixels]
        padded = [*same, *same[:1] * ((1 << (len(same) - 1).bit_length()) - len(same))]
        put = partial(self._placement.put, where=self._placement.whole)
        laid = Laid(*(put(np.stack(each)) for each in zip(*padded, strict=True)))
        return Encoding(laid, len(same), put(np.zeros((len(padded), 1), np.float32)))

    def together(self, pixels: Sequence[NDArray[np.uint8]]) -> list[int]:
        """Which of these prepared pictures go with the first: those of its shape, no more than take what one may."""
        sizes = [self.encoder.length(each) for each in pixels]
        most = max(1, min(TOGETHER, most_patches(self.encoder) // sizes[0]))
        return [i for i, size in enumerate(sizes) if size == sizes[0]][:most]

    def each_program(self, params: Params) -> list[Program]:
        """What encodes one picture, for each length that there is; several together compile when they first come."""
        return [
            Program(f"encoding of {length} patches", False, partial(self._run_all, params, length))
            for length in self.encoder.lengths
        ]

    def _run_all(self, params: Params, patches: int) -> None:
        """Each program once, on padding."""
        put, own = partial(self._placement.put, where=self._placement.whole), params["encoder"]
        laid = Laid(*(put(each[None]) for each in self.encoder.blank(patches)))
        outer = {name: weight for name, weight in own.items() if name != "blocks"}
        state, ran = put(np.zeros((1, 1), np.float32)), set[str]()
        for stage, kind in enumerate(self.encoder.kinds):
            if kind not in ran:
                state = self._run(kind, outer, self._block(own, stage), state, laid)
            ran.add(kind)
        jax.block_until_ready(state)

    def go_on(self, params: Params, encoding: Encoding, most: float) -> bool:
        """Run stages of at most ``most`` multiplications, and one at least; whether all have run. Waits for them."""
        kinds, spent, (count, patches) = self.encoder.kinds, 0, encoding.laid.valid.shape
        own = params["encoder"]
        outer = {name: weight for name, weight in own.items() if name != "blocks"}
        while encoding.stage < len(kinds):
            kind = kinds[encoding.stage]
            cost = count * patches * self.encoder.cost(kind, patches)
            if spent and spent + cost > most:
                break
            spent += cost
            encoding.state = self._run(kind, outer, self._block(own, encoding.stage), encoding.state, encoding.laid)
            encoding.stage += 1
        jax.block_until_ready(encoding.state)
        return encoding.stage == len(kinds)

    def _block(self, own: Params, stage: int) -> Params:
        """The weights of a stage that is a block; nothing for the first and the last."""
        block: Params = own["blocks"][stage - 1] if 1 <= stage <= self.encoder.depth else {}
        return block

    @cached_property
    def _run(self) -> Any:
        def run(kind: str, outer: Params, block: Params, states: Array, laid: Laid) -> Array:
            each = jax.vmap(partial(self.encoder.stage, kind), in_axes=(None, None, 0, 0))
            return each(outer, block, states, jax.tree.map(jnp.asarray, laid))

        return jax.jit(run, static_argnums=0, out_shardings=self._placement.whole)
