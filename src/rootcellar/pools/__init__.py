"""Compute: the buffers that hold the cache's bytes."""

from rootcellar.pools.pool import PagedKV, Pool

__all__ = ["PagedKV", "Pool"]
