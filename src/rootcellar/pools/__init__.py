"""Compute: the buffers that hold the cache's bytes."""

from rootcellar.pools.layouts import Layout, PagedKV, PagedLatent, States
from rootcellar.pools.pool import Pool

__all__ = ["Layout", "PagedKV", "PagedLatent", "Pool", "States"]
