"""Compute: the buffers that hold the cache's bytes, and how the bytes lie in them."""

from rootcellar.pools.layouts import Layout, PagedRoutes, layout_of
from rootcellar.pools.pool import Pool

__all__ = ["Layout", "PagedRoutes", "Pool", "layout_of"]
