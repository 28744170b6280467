"""Compute: the buffers that hold the cache's bytes."""

from rootcellar.pools.pool import PagedKV, Pool, default_sharding

__all__ = ["PagedKV", "Pool", "default_sharding"]
