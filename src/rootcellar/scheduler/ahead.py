"""The step after the one that runs, planned before anybody knows what that gives.

A request that decodes is one token longer after a step, whichever token that is. So the next step can be planned, and
handed to the device with the token still there; the host takes what the first step gave while the second runs.

The step planned ahead is the one that would be planned then, or has requests too many: those whose last token came
unexpectedly (a stop token, a stop string). What is computed of these is dropped. They held on to their memory a step
longer, so one that waits for it starts a step later, and what leaves the cache to make room may leave a step earlier;
nothing else differs.

What such a request still writes lies behind its last whole page, where nobody has hit it. Whoever is given the place
writes there in a later step, or by a copy, and all of them go through the same buffers, one after the other.
"""

from __future__ import annotations

from rootcellar.scheduler.plan import Chunk, Plan, new_chunk
from rootcellar.scheduler.snapshots import Snapshots


def chunks_ahead(plan: Plan, running: int, snapshots: Snapshots | None) -> dict[int, Chunk] | None:
    """After ``plan``, the newest token of each request that goes on, by the place of its chunk in ``plan``.

    A request whose full length is reached with ``plan`` is not among them. None where the next step might be another
    one, or would take away what is wanted:

    * a prompt is to be computed: one of the ``running`` has no chunk in ``plan``, or one that is not its prompt's last;
    * what a request may say next follows from the token before (``Request.bound``);
    * a request may leave its recurrent state after ``plan``, over which the next step writes.
    """
    ahead = {}
    for i, (request, _, stop, ends, _) in enumerate(plan.chunks):
        if request.finish is not None:  # in the step before
            continue
        if not ends or request.bound or (snapshots is not None and snapshots.possible(request, stop)):
            return None
        running -= 1
        if stop + 1 < len(request.ids):
            ahead[i] = new_chunk((request, stop, stop + 1, True, ()))
    return None if running else ahead
