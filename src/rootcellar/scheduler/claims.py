"""Who makes way for a request of somebody who has nothing running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rootcellar.scheduler.request import Request
from rootcellar.scheduler.shares import Held
from rootcellar.scheduler.stages import FORWARD

Admission = tuple[int, int]
"""Of a running request: its place in the order of admission, and the plans made before."""


@dataclass(frozen=True)
class Claims:
    """Settles claims.

    Attributes:
        chunk: most prompt tokens of a step.
        rows: most requests that run.
        page_size: tokens of a page.
    """

    chunk: int
    rows: int
    page_size: int

    def who_make_way(
        self,
        claimant: Request,
        cached: int,
        lacking: int,
        running: Sequence[Request],
        admitted: Mapping[Request, Admission],
        plans: int,
    ) -> list[Request]:
        """Running requests in whose place ``claimant`` can start: the youngest of whoever has most.

        Where the youngest hold too little, those who hold most tokens. Nobody, where all that may be asked are too few.

        Args:
            claimant: a request that waits.
            cached: tokens of it that need not be computed.
            lacking: tokens that more room is needed for.
            running: all that run, each with a lease.
            admitted: of each of them.
            plans: plans made until now.
        """
        gives = {r: r.length - (0 if r.lease is None else r.lease.cached) + self.page_size for r in running}
        served = self._served(claimant, cached, {r: plans - admitted[r][1] for r in running})
        for rank in (admitted.__getitem__, lambda r: (gives[r], *admitted[r])):
            left, held, going, missing = list(running), Held(running), list[Request](), lacking
            while not going or len(left) >= self.rows or missing > 0:
                asked = held.above(claimant, left)
                if not asked and not held.tenants[claimant.tenant]:
                    asked = [r for r in left if r in served]
                if not asked:
                    break
                gone = max(held.largest(asked), key=rank)
                left.remove(gone)
                held.add(gone, -1)
                going.append(gone)
                missing -= gives[gone]
            else:
                return going
        return []

    def _served(self, claimant: Request, cached: int, steps: Mapping[Request, int]) -> set[Request]:
        """Requests of other tenants that had as many ``steps`` as the claimant asks for, and may wait as long."""
        prefill = -(-(claimant.length - cached) // self.chunk)
        asked = max(1, prefill + claimant.sampling.max_new_tokens - claimant.generated - 1)
        return {r for r, n in steps.items() if n >= asked and r.tenant != claimant.tenant and r.stage in FORWARD}
