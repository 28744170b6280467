"""What a layer's mixer is told of the packed batch that it runs for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rootcellar.models.spec import Axis
from rootcellar.pools.layouts import TokenLayout

Local = Callable[[Callable[..., Any], Sequence[tuple[Axis, ...]], Sequence[tuple[Axis, ...]]], Callable[..., Any]]
"""``local(function, inputs, outputs)``: ``function`` as each device of a tensor-parallel mesh runs it on its part of
the arguments. ``inputs`` and ``outputs`` name the logical axes of each argument and result, as ``ParamSpec.axes`` does;
what is not named is whole on every device. On one device: ``function`` itself."""


@dataclass(frozen=True)
class ForwardBatch:
    """One packed batch, as the layers of one kind see it (see ``runner.batch``).

    Attributes:
        positions: int32 [T], -1 for padding; consecutive within a tile, padding last.
        rows: int32 [tiles], the row of ``table`` that each tile belongs to; T is a multiple of ``tiles``.
        table: int32 [R, W], the kind's page table: pages of the row's positions, 0 where there is none. For a
            recurrent kind [R, 2]: the state to read (0: begin from zeros) and the state to write.
        layout: of the kind's pages.
        backend: of attention, by name (see ``ops.backends``).
        local: runs a function on each device's own heads.
        places: int32 [3, T], where rotary embeddings take each token to be, in time, height and width; None: where
            ``positions`` has it.
        until: int32 [T], the last position that each token sees; None: its own. A picture's tokens see each other.
        verifies: whether rows of a recurrent kind may follow each other (``ops.recurrent``), as guessed tokens do.
    """

    positions: jax.Array
    rows: jax.Array
    table: jax.Array
    layout: TokenLayout
    backend: str
    local: Local
    places: jax.Array | None = None
    until: jax.Array | None = None
    verifies: bool = False

    @property
    def attended(self) -> tuple[str, jax.Array]:
        """The backend that attends, and what it is told of positions: of those that see further, xla, and both."""
        if self.until is None:
            return self.backend, self.positions
        return "xla", jnp.stack([self.positions, self.until])

    @property
    def turned_by(self) -> jax.Array:
        """What rotary embeddings turn by: int32 [3, T], or [T] where a place is a position; padding is at 0."""
        return jnp.maximum(self.positions, 0) if self.places is None else self.places
