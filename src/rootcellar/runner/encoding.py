"""Running an encoder of pictures: several at a time, a stage after the other, so that steps may come between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.models.encoders import Encoder, EncoderStage, Laid
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

    ``left``: the stages to come; after the last ``state`` has the vectors, [B, M, E]. ``held``: what parts of a block
    take beside it.
    """

    laid: Laid
    count: int
    state: Array
    left: Sequence[EncoderStage]
    held: Any = ()


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
        stages = self.encoder.stages(laid.valid.shape[1])
        return Encoding(laid, len(same), put(np.zeros((len(padded), 1), np.float32)), stages)

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
        put = partial(self._placement.put, where=self._placement.whole)
        laid = Laid(*(put(each[None]) for each in self.encoder.blank(patches)))
        stages = self.encoder.stages(patches)
        first = {stage.kind: stage for stage in reversed(stages)}
        left = [stage for stage in stages if stage is first[stage.kind]]
        self.go_on(params, Encoding(laid, 1, put(np.zeros((1, 1), np.float32)), left), math.inf)

    def go_on(self, params: Params, encoding: Encoding, most: float) -> bool:
        """Run stages of at most ``most`` multiplications, and one at least; whether all have run. Waits for them."""
        spent, (count, patches) = 0, encoding.laid.valid.shape
        own = params["encoder"]
        outer = {name: weight for name, weight in own.items() if name != "blocks"}
        while encoding.left:
            stage = encoding.left[0]
            cost = count * self.encoder.cost(stage.kind, patches)
            if spent and spent + cost > most:
                break
            spent += cost
            block = {} if stage.block is None else own["blocks"][stage.block]
            held, part = ((), 0) if stage.part is None else (encoding.held, stage.part)
            encoding.state, encoding.held = self._run(
                stage.kind, outer, block, encoding.state, held, np.int32(part), encoding.laid
            )
            encoding.left = encoding.left[1:]
        jax.block_until_ready(encoding.state)
        return not encoding.left

    @cached_property
    def _run(self) -> Any:
        def run(
            kind: str, outer: Params, block: Params, states: Array, held: Any, part: Array, laid: Laid
        ) -> tuple[Array, Any]:
            each = jax.vmap(partial(self.encoder.stage, kind), in_axes=(None, None, 0, 0, None, 0))
            return each(outer, block, states, held, part, jax.tree.map(jnp.asarray, laid))

        return jax.jit(run, static_argnums=0, out_shardings=self._placement.whole)
