"""Which experts a request's tokens went through: read, when it ends, from the pages that its tokens have.

They lie in pages of their own, by the same slots as keys and values (``models.kinds.EXPERTS``), so what was cached of a
prompt has them, whoever computed it, and from whatever tier or node it came.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rootcellar.models.kinds import EXPERTS, routed_layers
from rootcellar.pools import PagedRoutes
from rootcellar.pools.copying import read_pages
from rootcellar.runner import Runner
from rootcellar.scheduler import Plan, Request


@dataclass
class Routed:
    """Of one request.

    Attributes:
        start: the first token whose experts are wanted.
        pages: those of its tokens, as they were when it was last computed, ``stop`` tokens of it, after so many
            ``retractions``; None: it never was.
        found: int32 [tokens from ``start`` to before the last, layers of the model, experts]: the last token of an
            answer goes through none. 0 in layers without a router. None: they are not known.
    """

    start: int
    pages: NDArray[np.int32] | None = None
    stop: int = 0
    retractions: int = 0
    found: NDArray[np.int32] | None = None

    @cached_property
    def text(self) -> str:
        """What was found as SGLang writes it: little-endian integers in base64."""
        assert self.found is not None
        return base64.b64encode(self.found.astype("<i4").tobytes()).decode()


class Routing:
    """Of an engine that keeps pages of experts."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        layout = runner.programs.paging.layouts[EXPERTS]
        assert isinstance(layout, PagedRoutes)
        self._layout = layout

    def note(self, plan: Plan, of: Mapping[Request, Routed | None], tables: Mapping[str, NDArray[np.int32]]) -> None:
        """Remember the pages of who is computed now, ``of`` whom what is wanted; ``tables``: the cache's."""
        for chunk in plan.chunks:
            request, routed = chunk.request, of[chunk.request]
            if routed is not None and request.lease is not None:
                pages = tables[EXPERTS][request.lease.row]
                routed.pages, routed.stop = pages.copy(), chunk.stop
                routed.retractions = request.retractions

    def read(self, request: Request, routed: Routed | None) -> None:
        """Read those of a request that ended just now: nothing was written over its pages yet."""
        finish = request.finish
        if routed is None or routed.pages is None or routed.retractions != request.retractions or finish is None:
            return
        if finish.type == "abort" and finish.cause == "failed":
            return
        size = self._layout.page_size
        stop = min(routed.stop, request.length - 1) if finish.type == "abort" else request.length - 1
        first = routed.start // size
        images = read_pages(self._runner.copiers[EXPERTS], routed.pages[first : -(-stop // size)])
        chosen = images.view(self._layout.dtype).reshape(-1, self._layout.layers, self._layout.top_k)
        chosen = chosen[routed.start - first * size : max(stop - first * size, 0)]
        model = self._runner.placement.served
        found = np.zeros((len(chosen), model.num_layers, self._layout.top_k), np.int32)
        found[:, routed_layers(model)] = chosen
        routed.found = found
