"""States of recurrent layers (Mamba, gated delta)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from rootcellar.plan.grids import NARROW
from rootcellar.plan.stored import DTYPES, WIDE, Form, States
from rootcellar.pools.layouts.layout import Axes, as_it_lies

SERVES = (*DTYPES, *NARROW)


@dataclass(frozen=True)
class Slots:
    """A page is the state of one request, whole on every device, whatever the tokens in a page of other layers.

    ``conv``: shape of the convolution's last inputs, in ``dtype``; ``state``: of the recurrent state, which accumulates
    over the whole sequence and so stays float32.
    """

    name: ClassVar[str] = "states"
    form: ClassVar[Form] = "states"
    page_size: ClassVar[int] = 1
    axes: ClassVar[tuple[Axes, ...]] = ((), ())
    unfolded = property(as_it_lies)
    conv: tuple[int, ...]
    state: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def image(self) -> tuple[tuple[int, ...], ...]:
        """As they are."""
        return tuple(range(len(self.conv))), tuple(range(len(self.state)))

    def buffers(self, pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Two buffers, ``[pages, *conv]`` and ``[pages, *state]``."""
        return (
            jax.ShapeDtypeStruct((pages, *self.conv), self.dtype),
            jax.ShapeDtypeStruct((pages, *self.state), jnp.float32),
        )


def make(stored: States, dtype: str, page_size: int) -> Slots:  # noqa: ARG001 - see Slots
    """The layout of one state for each request."""
    return Slots(stored.conv, stored.state, jnp.dtype(WIDE if dtype in NARROW else dtype))
