"""What recurrent mixers have in common."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Self

from jax import Array

from rootcellar.cache.kind import Rule
from rootcellar.models.forward_batch import ForwardBatch
from rootcellar.models.spec import Params
from rootcellar.ops.backends import FIXED
from rootcellar.ops.recurrent import ConvInPlace, Course, HeadStep, StatesInPlace, in_order
from rootcellar.ops.states import conv_in_states, in_states


def _by_kernel(
    head: HeadStep, pool: Array, way: Course, operands: Sequence[Array], width: int, *, interpret: bool = False
) -> tuple[Array, Array]:
    from rootcellar.ops.slots import each_slot  # Pallas takes a while to import, and is for TPUs alone

    return each_slot(head, pool, way, operands, width, interpret=interpret)


IN_PLACE: Mapping[str, StatesInPlace] = {"native": in_states, FIXED: in_states, "tpu": _by_kernel}
"""By the backend of attention that it runs beside; elsewhere states are gathered and scattered."""
CONV_IN_PLACE: Mapping[str, ConvInPlace] = {"native": conv_in_states, FIXED: conv_in_states}
"""The same of convolutions."""
_FOLLOWED = ("native", FIXED)
"""Those whose own business it is that rows follow each other."""


class Recurrent:
    """What every recurrence answers as a ``Mixer``: its rule, and that each device computes all of it.

    No parameter names an axis that is split, so the other layers' heads may be.
    """

    rule: Rule = "recurrent"
    span: int = 0

    def served(self, tp_size: int) -> Self:  # noqa: ARG002
        """See ``Mixer``."""
        return self

    def as_served(self, params: Params, tp_size: int) -> Params:  # noqa: ARG002
        """See ``Mixer``."""
        return params

    def splits(self, tp_size: int) -> bool:  # noqa: ARG002
        """See ``Mixer``."""
        return True

    @staticmethod
    def in_place(batch: ForwardBatch) -> StatesInPlace | None:
        """What takes a decode step through states where they lie, on each device all of it; None: where XLA does.

        Where tokens are guessed a token may go on from the one before it, if the step has more than one.
        """
        run, verifies = IN_PLACE.get(batch.backend), batch.verifies and len(batch.rows) > 1
        if run is None:
            return in_order if verifies else None

        def on_each(
            head: HeadStep, pool: Array, way: Course, operands: Sequence[Array], width: int
        ) -> tuple[Array, Array]:
            def here(pool: Array, way: Course, *operands: Array) -> tuple[Array, Array]:
                return run(head, pool, way, operands, width)

            y, pool = batch.local(here, [()] * (2 + len(operands)), [()] * 2)(pool, way, *operands)
            return y, pool

        apart = verifies and batch.backend not in _FOLLOWED
        return functools.partial(in_order, first=on_each) if apart else on_each

    @staticmethod
    def conv_in_place(batch: ForwardBatch) -> ConvInPlace | None:
        """The same for the convolution."""
        run = CONV_IN_PLACE.get(batch.backend)
        return None if run is None else batch.local(run, [()] * 5, [()] * 2)
