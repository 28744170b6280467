"""The native core by itself: its choice, its names of pages, its memory, and misuse that must not reach memory."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import weakref
from array import array

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


def device(size=1024):
    """Pages of one token, full attention on the device alone."""
    return CORES["native"]([full("full")], page_size=1, capacity={("full", Tier.DEVICE): size}, max_length=512)


@pytest.mark.parametrize(("value", "core"), [("1", "python"), ("0", "native")])
def test_the_environment_chooses(value, core):
    code = "from rootcellar.cache import CORE, Hit, RadixCache; print(CORE, RadixCache.__name__, Hit.__module__)"
    environment = os.environ | {"ROOTCELLAR_NO_NATIVE": value}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    chosen, name, module = shown.stdout.split()
    assert chosen == core
    assert name == {"python": "PyRadixCache", "native": "NativeRadixCache"}[core]
    assert module == {"python": "rootcellar.cache.match", "native": "rootcellar.cache._core"}[core]


@pytest.mark.parametrize("most", [0, 1, 2], ids=["portable", "sha", "wide"])
def test_digests_are_those_of_hashlib(most):
    from rootcellar.cache import _core

    rng = np.random.default_rng(0)
    for page_size in (*range(1, 40), 64, 256):
        narrow = rng.integers(0, 1 << 32, 13 * page_size + 3)
        mixed = narrow.copy()
        mixed[3 * page_size], mixed[5 * page_size] = -7, 1 << 32
        one_wide = [np.where(np.arange(len(narrow)) == at, 1 << 40, narrow) for at in range(0, len(narrow), page_size)]
        parts = [narrow[: pages * page_size] for pages in range(14)]
        for ids in (narrow, mixed, -narrow, narrow[: page_size - 1], *parts, *one_wide):
            parent = rng.bytes(32)
            assert _core.chain(parent, ids, page_size, most) == chain(parent, ids, page_size)


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


@pytest.mark.parametrize("lasting", [False, True])
def test_memory_is_a_token_id_a_token(lasting):
    """Pages that count up take nothing, whoever has the token ids."""
    cache = device(size=100_000)
    empty = cache.memory_bytes()
    for first in range(0, 90_000, 500):
        prompt = np.arange(first, first + 500)
        prompt.flags.writeable = not lasting
        serve(cache, prompt)
    assert cache.stats().nodes == 180
    assert 8 < (cache.memory_bytes() - empty) / 90_000 < 8 + 3 * cache._node_bytes() / 500


def test_memory_is_two_numbers_more_a_token_where_pages_never_count_up():
    cache = device(size=2048)
    empty = cache.memory_bytes()
    leases = [cache.open(cache.match(Key([i]))) for i in range(4)]
    for _ in range(500):
        assert all(cache.grow_many(leases))
    for i, lease in enumerate(leases):
        cache.commit(lease, Key(np.arange(1000 * i, 1000 * i + 500)))
    cache.close_many(leases)
    assert cache.slots(cache.match(Key(range(500))), "full").tolist() == list(range(1, 2001, 4))
    assert (cache.memory_bytes() - empty) / 2000 < 8 + 8 + 3
    cache.check()


# ---- keys that never change ----------------------------------------------------------------------------------------


def lasting(count: int, first: int = 0) -> np.ndarray:
    prompt = np.arange(first, first + count)
    prompt.flags.writeable = False
    return prompt


def test_a_prompt_that_never_changes_is_not_copied_and_is_held_as_long_as_it_is_cached():
    cache = device()
    prompt = lasting(200)
    memory = weakref.ref(prompt)
    serve(cache, prompt)
    held = cache._ledger_bytes()
    del prompt
    gc.collect()
    assert memory() is not None
    assert cache.match(Key(range(200))).length == 200
    cache.flush()
    gc.collect()
    assert memory() is None, "the cache let go of it"
    assert cache._ledger_bytes() < held - 8 * 200


@pytest.mark.parametrize("chunk", [None, 64])
def test_a_prompt_that_may_change_is_copied(chunk):
    cache = device()
    prompt = np.arange(200)
    serve(cache, prompt, chunk=chunk)
    prompt[:] = 7
    assert cache.match(Key(range(200))).length == 200
    cache.check()


def test_chunks_of_one_prompt_stay_one_piece_of_its_memory():
    cache = device()
    prompt = lasting(250)
    serve(cache, prompt[:100])
    few = cache._ledger_bytes()
    cache.flush()
    serve(cache, prompt, chunk=80)
    assert cache.stats().nodes == 1
    assert cache._ledger_bytes() == few, "the whole array is held either way, once"
    assert cache.match(Key(range(250))).length == 250


def test_a_small_part_of_a_large_array_is_copied():
    cache = device()
    memory = lasting(100_000)
    serve(cache, memory[50_000:50_200])
    assert cache._ledger_bytes() < 100_000
    assert cache.match(Key(range(50_000, 50_200))).length == 200


def held_by(thing) -> list[int]:
    """How often an array and each thing whose memory it shows are referred to."""
    counts = []
    while thing is not None:
        counts.append(sys.getrefcount(thing))
        thing = getattr(thing, "base", None)
    return counts


class Array(np.ndarray):
    """Letting go of one may run anything."""


@pytest.mark.parametrize(
    "odd",
    [
        Array((200,), np.int64, np.arange(200)).copy(),
        np.frombuffer(np.arange(200).tobytes(), np.int64),
        np.asarray(array("q", range(200))),
        np.full(1608, 7, np.uint8)[4:-4].view(np.int64),
    ],
    ids=["subclass", "bytes", "array", "unaligned"],
)
def test_memory_that_is_not_an_aligned_array_of_numpys_own_is_copied(odd):
    cache = device()
    odd.flags.writeable = False
    held = Key(odd).tokens
    before = held_by(held)
    serve(cache, held)
    assert held_by(held) == before
    assert cache.match(Key(odd.tolist())).length == 200


def test_a_view_is_held_by_what_it_is_a_view_of():
    cache = device()
    whole = np.arange(400).reshape(200, 2).copy(order="F")
    column = whole[:, 1]
    column.flags.writeable = False
    before = held_by(whole)
    serve(cache, column)
    assert held_by(whole) == [before[0] + 1]
    cache.flush()
    assert held_by(whole) == before


def test_what_a_key_made_itself_never_changes_and_what_it_was_given_is_left_alone():
    given = np.arange(4)
    for tokens_of, own in (([1, 2], True), (range(3), True), (np.arange(4, dtype=np.int32), True), (given, False)):
        assert Key(tokens_of).tokens.flags.writeable is not own
    assert Key(given).tokens is given


def test_what_runs_when_memory_is_let_go_may_use_the_cache():
    cache = device(size=400)
    seen = []
    for i in range(6):
        prompt = lasting(200, 1000 * i)
        weakref.finalize(prompt, lambda: seen.append(serve(cache, range(9000, 9020)).length))
        serve(cache, prompt)
        del prompt
        gc.collect()
    assert len(seen) >= 2, "two prompts fit"
    assert set(seen) == {20}
    cache.check()


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


def test_verbs_are_entered_in_any_way_of_calling():
    """The usual calls and the others go through different doors."""
    cache = native()
    key = Key(tokens((0, 8)))
    lease = cache.open(hit=cache.match(key=key), tier=Tier.DEVICE, priority=3)
    assert lease.priority == 3
    assert cache.grow(lease=lease, tokens=4)
    assert cache.grow(lease, tokens=4)
    cache.commit(lease, key=key, snapshot=False)
    cache.close(lease, False)
    cache.check()
    lease = cache.open(cache.match(key))
    assert cache.grow(lease, 8 - lease.length)
    cache.commit(lease, key)
    cache.close(lease)
    cache.check()
    for wrong in (
        cache.match,
        lambda: cache.match(key, key),
        lambda: cache.open(cache.match(key), Tier.DEVICE, 3),
        lambda: cache.grow(lease),
        lambda: cache.commit(lease, key, False),
        cache.close,
        lambda: cache.close(lease, kept=True),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(RequestError, match="closed already"):
        cache.close(lease)
    with pytest.raises(RequestError, match="closed already"):
        cache.close(lease, False)
    for verb in ("match", "open", "grow", "commit", "close"):
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(core, verb)).parameters.values()][1:]
            for core in (CORES["native"], CORES["python"])
        )
        assert ours == theirs


@pytest.mark.filterwarnings("ignore:nanobind")
def test_a_cache_that_was_not_made_is_refused():
    blank = CORES["native"].__new__(CORES["native"])
    for call in (lambda: blank.match(Key([1])), lambda: blank.open(None), lambda: blank.close(None)):
        with pytest.raises(TypeError):
            call()


def test_lone_surrogates_are_a_namespace_like_any_other():
    cache = native(events=True, fingerprint=b"m")
    name = "tenant \ud800"
    serve(cache, tokens((0, 16)), namespace=name)
    assert cache.match(Key(tokens((0, 16)), name)).branch == 16
    assert {event.extra_keys for event in cache.take_events()} == {((name,),) * 4}
