"""``native``, with sums whose order follows from positions alone: a query gets the same whatever is beside it.

Blocks of keys begin at multiples of their length, no context is split over threads, and one kernel serves decoding and
prefill. Prefill is slower for it.
"""

from __future__ import annotations

from rootcellar.ops.backends import native
from rootcellar.ops.backends.backend import Attend
from rootcellar.ops.reach import Reach
from rootcellar.pools import Layout
from rootcellar.pools.layouts import NarrowHeads, TokenLayout


def lacks(layout: Layout, platform: str) -> str | None:
    """See ``Backend``."""
    if isinstance(layout, NarrowHeads):
        return "a cache of few bits depends on the batch: leave kv_cache_dtype at 'auto'"
    return native.lacks(layout, platform)


def attend(layout: TokenLayout, reach: Reach) -> Attend:
    """See ``Backend``."""
    return native.attend(layout, reach, fixed=True)
