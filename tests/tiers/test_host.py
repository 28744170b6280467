"""How much host memory the cache takes, and what becomes of what does not fit."""

import pytest

from rootcellar.errors import ConfigError
from rootcellar.tiers.host import HostMemory, free_memory, host_rows

GB = 10**9
DEVICE, BYTES = {"full": 1000, "state": 10}, {"full": 10**6, "state": 10**7}  # 1.1 GB


def rows(ratio=2.0, size=0.0, fraction=None, free=100 * GB):
    return host_rows(DEVICE, BYTES, ratio=ratio, size=size, fraction=fraction, free=free)


def test_each_pool_has_as_many_times_the_devices_pages():
    assert rows() == {"full": 2000, "state": 20}
    assert rows(ratio=0.25) == {"full": 250, "state": 2}
    assert rows(size=2.2) == {"full": 2000, "state": 20}
    assert rows(size=0.55, ratio=7.0) == {"full": 500, "state": 5}
    assert rows(fraction=0.8, free=10 * 2**30 + int(2.75 * GB)) == {"full": 2000, "state": 20}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"free": 2 * GB}, r"hicache_ratio=2 takes 2.20 GB .* 2.00 GB are left for it: at most hicache_ratio=1.81 or "),
        ({"size": 50.0, "free": 20 * GB}, "hicache_size=50 takes 49.99 GB .* or hicache_size=20 would fit"),
        ({"fraction": 0.5, "free": 5 * GB}, "hicache_host_memory_fraction=0.5 leaves no page"),
        ({"ratio": 0.0001}, "hicache_ratio=0.0001 leaves no page"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_figures(options, words):
    with pytest.raises(ConfigError, match=words):
        rows(**options)


def test_what_would_fit_fits():
    free = 3 * GB
    for options in ({"ratio": int(100 * free / (1.1 * GB)) / 100}, {"size": 3.0}):
        assert rows(**options, free=free)


def test_memory_is_mapped_as_pages_of_the_machine():
    host = HostMemory({"full": 3, "state": 0}, {"full": 8192, "state": 64})
    assert host.nbytes == 3 * 8192
    assert host.images["full"].ctypes.data % 4096 == 0
    assert not host.images["full"].any()
    assert host.images["full"].flags.writeable
    assert free_memory() > 0
