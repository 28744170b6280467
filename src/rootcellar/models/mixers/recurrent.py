"""What recurrent mixers have in common."""

from __future__ import annotations

from typing import Self

from rootcellar.cache.kind import Rule
from rootcellar.models.spec import Params


class Recurrent:
    """What every recurrence answers as a ``Mixer``: its rule, and that each device computes all of it.

    No parameter names an axis that is split, so the other layers' heads may be.
    """

    rule: Rule = "recurrent"
    span: int = 0

    def served(self, tp_size: int) -> Self:  # noqa: ARG002
        """See ``Mixer``."""
        return self

    def repeat(self, params: Params, tp_size: int) -> Params:  # noqa: ARG002
        """See ``Mixer``."""
        return params

    def splits(self, tp_size: int) -> bool:  # noqa: ARG002
        """See ``Mixer``."""
        return True
