"""The native core by itself: its choice, its names of pages, its memory, and misuse that must not reach memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import CORES, serve, tokens

from rootcellar.cache import Done, Key, Tier, full, recurrent, sliding_window
from rootcellar.cache.digest import chain
from rootcellar.errors import RequestError

pytestmark = pytest.mark.skipif("native" not in CORES, reason="the native core was not built")

KINDS = (full("full"), sliding_window("window", window=8), recurrent("state"))


def native(kinds=KINDS, size=256, page_size=4, **options):
    capacity = {(k.name, tier): size for k in kinds for tier in (Tier.DEVICE, Tier.HOST)}
    return CORES["native"](kinds, page_size=page_size, capacity=capacity, max_length=512, **options)


@pytest.mark.parametrize(("value", "core"), [("1", "python"), ("0", "native")])
def test_the_environment_chooses(value, core):
    code = "from rootcellar.cache import CORE, Hit, RadixCache; print(CORE, RadixCache.__name__, Hit.__module__)"
    environment = os.environ | {"ROOTCELLAR_NO_NATIVE": value}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    chosen, name, module = shown.stdout.split()
    assert chosen == core
    assert name == {"python": "PyRadixCache", "native": "NativeRadixCache"}[core]
    assert module == {"python": "rootcellar.cache.match", "native": "rootcellar.cache._core"}[core]


@pytest.mark.parametrize("portable", [False, True])
def test_digests_are_those_of_hashlib(portable):
    from rootcellar.cache import _core

    rng = np.random.default_rng(0)
    for page_size in (*range(1, 40), 64, 256):
        narrow = rng.integers(0, 1 << 32, 7 * page_size + 3)
        mixed = narrow.copy()
        mixed[3 * page_size], mixed[5 * page_size] = -7, 1 << 32
        for ids in (narrow, mixed, -narrow, narrow[: page_size - 1]):
            parent = rng.bytes(32)
            assert _core.chain(parent, ids, page_size, portable) == chain(parent, ids, page_size)


def test_what_comes_and_goes_takes_no_memory_in_the_end():
    cache = native(events=True, policy="adaptive")
    taken = []
    for _ in range(4):
        for i in range(60):
            prompt = tokens((i % 7, 20 + i), (1000 * i, 30))
            serve(cache, prompt, namespace=f"tenant {i % 5}", chunk=16, keep=i % 6 > 0)
            for move in cache.moves():
                cache.learn(Done(move.id))
            cache.take_events()
        cache.flush()
        assert not cache.stats().nodes
        taken.append(cache._ledger_bytes())
    assert taken[1] == taken[2] == taken[3], "blocks are given back, slabs of nodes are used again"


def test_memory_is_a_token_id_and_a_page_number_a_token():
    cache = native((full("full"),), size=100_000, page_size=1)
    empty = cache.memory_bytes()
    for first in range(0, 90_000, 500):
        serve(cache, np.arange(first, first + 500))
    nodes = cache.stats().nodes
    assert nodes == 180
    assert 8 + 4 < (cache.memory_bytes() - empty) / 90_000 < 8 + 4 + 3 * cache._node_bytes() / 500


def test_hits_and_leases_of_another_cache_or_of_one_that_is_gone():
    cache, other = native(), native()
    for each in (cache, other):
        serve(each, tokens((0, 32)))
    serve(other, tokens((0, 32), (50, 32)))
    hit = other.match(Key(tokens((0, 64)), "elsewhere"))
    lease = cache.open(hit)
    assert (lease.cached, lease.namespace) == (0, "elsewhere")
    with pytest.raises(RequestError, match="closed already"):
        other.close(lease)
    with pytest.raises(RequestError, match="closed already"):
        other.grow_many([lease])
    table = cache.tables["full"]
    kept = cache.match(Key(tokens((0, 40))))
    del cache, other
    assert (kept.length, lease.length) == (32, 0)
    assert not table[0].any()


def test_what_is_not_int64_or_not_a_lease_is_refused():
    cache = native()
    lease = cache.open(cache.match(Key([1, 2, 3])))
    for wrong in (np.arange(4, dtype=np.int32), np.arange(8)[::2], np.arange(4.0), np.arange(4).reshape(2, 2)):
        key = Key([1])
        key.tokens = wrong
        with pytest.raises((TypeError, ValueError, BufferError)):
            cache.match(key)
        with pytest.raises((TypeError, ValueError, BufferError)):
            cache.commit(lease, key)
    for call in (
        lambda: cache.match([1, 2]),
        lambda: cache.grow("lease", 1),
        lambda: cache.grow_many([lease, None]),
        lambda: cache.open(lease),
        lambda: cache.open(cache.match(Key([1])), 9),
        lambda: cache.grow_many([lease], [1, 2]),
        lambda: cache.grow(lease, 1 << 70),
    ):
        with pytest.raises((TypeError, ValueError, OverflowError, AttributeError)):
            call()
    cache.close(lease)
    cache.check()


def test_lone_surrogates_are_a_namespace_like_any_other():
    cache = native(events=True, fingerprint=b"m")
    name = "tenant \ud800"
    serve(cache, tokens((0, 16)), namespace=name)
    assert cache.match(Key(tokens((0, 16)), name)).branch == 16
    assert {event.namespace for event in cache.take_events()} == {name}
