"""What an encoder of pictures is to everybody else.

An encoder works in *stages*, each a small program over the same state, so that a large picture does not keep decoding
waiting for longer than one of them. Stages of one *kind* are one program with other weights. A block in which patches
see the whole picture is several stages: keys and values of all, and then a part of the rows after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from rootcellar.models.spec import Declare, Params


class Laid(NamedTuple):
    """A picture as the stages take it, in one of few shapes.

    Attributes:
        patches: uint8 [N, ...], padded with zeros.
        valid: bool [N]: what is no padding.
        at: int32 [2, N]: row and column of each patch.
        order: int32 [M]: which of the results stands in each place of the prompt; padded with 0.
    """

    patches: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    at: NDArray[np.int32]
    order: NDArray[np.int32]


class EncoderStage(NamedTuple):
    """One stage: the ``kind`` of program, the ``block`` whose weights it takes (None: it is outside of blocks).

    ``part``: which part of the rows it is about; None: all.
    """

    kind: str
    block: int | None = None
    part: int | None = None


class Encoder(Protocol):
    """An encoder of pictures. One frozen dataclass each, its preprocessing beside it."""

    @property
    def token(self) -> int:
        """The token that stands where a picture is to be."""
        ...

    @property
    def atomic(self) -> bool:
        """Whether each place of a picture sees all of it in the language model too, so that it is computed in one."""
        ...

    def stages(self, patches: int) -> tuple[EncoderStage, ...]:
        """What so many patches go through, in order."""
        ...

    def declare(self, declare: Declare, embed: int) -> Params:
        """Its parameters outside of blocks. ``embed``: elements of a vector that the model takes."""
        ...

    def declare_block(self, declare: Declare) -> Params:
        """Those of one block."""
        ...

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        ...

    def prepare(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture uint8 [height, width, 3] as it is encoded: resized. ``RequestError`` where it cannot be."""
        ...

    def size(self, prepared: NDArray[np.uint8]) -> int:
        """Places of a prompt that a prepared picture takes."""
        ...

    def places(self, prepared: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
        """Where each of them is, int32 [3, size] from the first one's place on; and how far the next token is."""
        ...

    def length(self, prepared: NDArray[np.uint8]) -> int:
        """Patches of a prepared picture as it is laid: pictures of one length are encoded together."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Those that there are, ascending; a bound of the longest, where some are that no usual picture has."""
        ...

    def workspace(self, patches: int) -> int:
        """Most elements that a stage has at a time beside its weights, for so many patches: an upper bound."""
        ...

    def lay(self, prepared: NDArray[np.uint8]) -> Laid:
        """A prepared picture for the stages."""
        ...

    def blank(self, patches: int) -> Laid:
        """Padding alone, of so many patches: what programs compile on."""
        ...

    def cost(self, kind: str, patches: int) -> int:
        """Multiplications of a stage, for so many patches."""
        ...

    def stage(
        self, kind: str, params: Params, block: Params, state: jax.Array, held: Any, part: jax.Array, laid: Laid
    ) -> tuple[jax.Array, Any]:
        """The state after a stage and what the parts that follow take beside it, inside a compiled program.

        Of the first stage ``state`` is anything; the last gives the vectors, [M, E]. ``block``: the weights of the
        stage's block, where it has one. ``held``: what the stage before gave, to one that is about the rows of
        ``part``, int32; nothing to others.
        """
        ...
