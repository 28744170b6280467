"""Host memory as a place for pages: one buffer for each pool, allocated once, a row for each page's image.

The memory is mapped, so it begins on a page of the machine's, is zeroed, and is taken from the machine when it is first
written.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rootcellar.errors import ConfigError
from rootcellar.plan.sizing import host_pages
from rootcellar.pools.images import Images
from rootcellar.units import gb

KEPT_BACK = 10 * 2**30
"""Bytes of free memory that ``hicache_host_memory_fraction`` leaves alone."""


class HostMemory:
    """Rows for so many images of each pool.

    ``images[pool]`` is uint8 ``[rows, bytes of an image]``; the cache's page ``n`` is row ``n - 1``, since page 0 is
    never one of the host's.
    """

    def __init__(self, rows: Mapping[str, int], image_bytes: Mapping[str, int]) -> None:
        self.images: dict[str, Images] = {pool: _mapped(count, image_bytes[pool]) for pool, count in rows.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(images.nbytes for images in self.images.values())


def _mapped(rows: int, nbytes: int) -> Images:
    if not rows:
        return np.zeros((0, nbytes), np.uint8)
    return np.frombuffer(mmap.mmap(-1, rows * nbytes), np.uint8).reshape(rows, nbytes)


def host_rows(
    device_pages: Mapping[str, int],
    image_bytes: Mapping[str, int],
    *,
    ratio: float,
    size: float,
    fraction: float | None,
    free: int,
) -> dict[str, int]:
    """Rows for each pool: as many times the device's pages, the same for all.

    Args:
        device_pages: pages of each pool, without that of padding.
        image_bytes: of a page of each pool.
        ratio: host pages for each on the device.
        size: GB (1e9 bytes) instead; 0: by the ratio.
        fraction: a part of ``free`` instead, less ``KEPT_BACK``; None: not so.
        free: bytes of memory that the machine can give.

    Raises:
        ConfigError: there is not so much memory; the message has the figures, and what would fit.
    """
    each = sum(count * image_bytes[pool] for pool, count in device_pages.items())
    if size:
        budget, how = int(size * 1e9), f"hicache_size={size:g}"
        ratio = budget / each
    elif fraction is not None:
        budget, how = int(max(0, free - KEPT_BACK) * fraction), f"hicache_host_memory_fraction={fraction:g}"
        ratio = budget / each
    else:
        how = f"hicache_ratio={ratio:g}"
    rows = host_pages(device_pages, ratio)
    nbytes = sum(count * image_bytes[pool] for pool, count in rows.items())
    if not any(rows.values()):
        raise ConfigError(
            f"{how} leaves no page of host memory: {gb(free)} GB are left for it, and {gb(each)} GB are as much as the "
            f"device holds; raise it, or leave out enable_hierarchical_cache"
        )
    if nbytes > free:
        raise ConfigError(
            f"{how} takes {gb(nbytes)} GB of host memory, and {gb(free)} GB are left for it: at most "
            f"hicache_ratio={int(100 * free / each) / 100:g} or hicache_size={int(free / 1e7) / 100:g} would fit"
        )
    return rows


def free_memory() -> int:
    """Bytes that this machine, or the container that limits the process, could still give."""
    free = 0
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, value, *_ = line.split()
        if name == "MemAvailable:":
            free = int(value) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int(Path(file).read_text(encoding="ascii")) for file in (limit, used))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        free = min(free, max(0, most - now))
    return free
