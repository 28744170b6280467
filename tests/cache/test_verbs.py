"""The verbs, one promise at a time."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import RadixCache, make, serve, start, tokens

from rootcellar.cache import Key, Lost, Tier, chunked_local, full, recurrent, sliding_window
from rootcellar.errors import CacheBroken, CacheBusy, ConfigError, RequestError, RequestTooLarge

pytestmark = pytest.mark.usefixtures("core")

DEVICE = ("full", Tier.DEVICE)


def test_a_second_request_resumes_at_the_last_whole_page():
    cache = make()
    serve(cache, tokens((0, 18)))
    assert cache.match(Key(tokens((0, 30)))).length == 16
    assert cache.match(Key(tokens((0, 10), (90, 9)))).length == 8
    assert cache.match(Key(tokens((5, 9)))).length == 0


def test_pages_are_numbered_from_one_and_rows_show_them():
    cache = make()
    lease = start(cache, tokens((0, 10)))
    assert cache.tables["full"][lease.row, :4].tolist() == [1, 2, 3, 0]
    assert not cache.tables["full"][0].any()
    cache.close(lease)
    assert not cache.tables["full"].any()
    assert cache.stats().shelves[DEVICE].cached == 8


def test_slots_of_a_wrong_guess_go_back_up_to_what_is_committed():
    cache = make((full("full"), sliding_window("window", window=5)))
    lease = start(cache, tokens((0, 10)))
    free = {name: cache.stats().shelves[name, Tier.DEVICE].free for name in ("full", "window")}
    assert cache.grow(lease, 1)
    assert cache.grow(lease, 8, step=False)
    assert cache.grow(lease, -8)
    assert lease.length == 11
    for kind in ("full", "window"):
        assert cache.stats().shelves[kind, Tier.DEVICE].free == free[kind]
        assert cache.tables[kind][lease.row, 2:5].tolist() == [3, 0, 0]
    with pytest.raises(RequestError, match="4 tokens cannot be given back of 11, of which 8"):
        cache.grow(lease, -4)
    assert cache.grow(lease, -3)
    cache.check()
    cache.close(lease)


def test_duplicates_computed_side_by_side_are_freed_on_commit():
    cache = make()
    key = Key(tokens((0, 16)))
    first, second = (cache.open(cache.match(key)) for _ in range(2))
    for lease in (first, second):
        assert cache.grow(lease, 16)
    cache.commit(first, key)
    cache.commit(second, key)
    rows = cache.tables["full"][[first.row, second.row], :4]
    assert np.array_equal(rows[0], rows[1])
    assert cache.stats().shelves[DEVICE].used == 16
    cache.check()


def test_grow_says_no_and_changes_nothing_when_all_is_pinned():
    cache = make(size=16)
    lease = start(cache, tokens((0, 12)))
    before = cache.stats()
    other = cache.open(cache.match(Key([7])))
    assert not cache.grow(other, 8)
    assert cache.stats().shelves == before.shelves
    assert cache.grow(other, 4)
    cache.close(lease)
    assert cache.grow(other, 8)
    assert cache.stats().shelves[DEVICE].evicted == 8
    cache.check()


def test_grow_many_answers_in_order_and_takes_whole_pages_once():
    cache = make(size=16)
    leases = [cache.open(cache.match(Key([i]))) for i in range(5)]
    assert cache.grow_many(leases) == [True, True, True, True, False]
    assert [lease.length for lease in leases] == [1, 1, 1, 1, 0]
    assert cache.grow_many(leases[:4]) == [True] * 4
    assert cache.available_tokens() == 0
    cache.check()


def test_grow_many_takes_a_number_for_each_and_names_a_lease_twice():
    cache = make(size=64)
    leases = [cache.open(cache.match(Key([i]))) for i in range(3)]
    assert cache.grow_many(leases, [5, 0, 60]) == [True, True, False]
    assert [lease.length for lease in leases] == [5, 0, 0]
    assert cache.grow_many([leases[1]] * 2) == [True, True]
    assert leases[1].length == 2
    assert cache.grow_many(tuple(leases), np.array([1, 1, 1])) == [True] * 3
    with pytest.raises(ValueError, match="as many"):
        cache.grow_many(leases, [1])
    cache.check()


def test_a_batch_commits_and_closes_as_one_by_one_would():
    cache = make()
    keys = [Key(tokens((100 * i, 9))) for i in range(4)]
    leases = [cache.open(cache.match(key)) for key in keys]
    assert all(cache.grow_many(leases, 9))
    cache.commit_many(leases, keys)
    assert [lease.committed for lease in leases] == [8] * 4
    with pytest.raises(ValueError, match="as many"):
        cache.commit_many(leases, keys[:2])
    cache.close_many(leases)
    assert all(cache.match(key).length == 8 for key in keys)
    cache.check()


def test_a_batch_with_a_closed_lease_is_refused_whole():
    cache = make()
    leases = [cache.open(cache.match(Key([i]))) for i in range(2)]
    cache.close(leases[1])
    for call in (
        lambda: cache.grow_many(leases),
        lambda: cache.commit_many(leases, [Key([]), Key([])]),
        lambda: cache.close_many(leases),
        lambda: cache.grow(leases[1], 1),
        lambda: cache.commit(leases[1], Key([])),
    ):
        with pytest.raises(RequestError, match="closed already"):
            call()
    assert cache.stats().leases == 1
    assert leases[0].length == 0
    cache.check()


@pytest.mark.parametrize("page_size", [1, 4])
def test_slots_of_a_hit_are_those_that_the_request_wrote(page_size):
    kinds = (full("full"), sliding_window("window", window=5), recurrent("state"))
    cache = make(kinds, page_size=page_size)
    lease = start(cache, tokens((0, 24)), chunk=8)
    written = cache.tables["full"][lease.row]
    cache.close(lease)
    hit = cache.match(Key(tokens((0, 30))))
    at = np.arange(24)
    serve(cache, tokens((0, 11), (70, 9)))  # cuts the edge: the hit is stale now
    slots = cache.slots(hit, "full")
    assert slots.dtype == np.int32
    lease = cache.open(cache.match(Key(tokens((0, 30)))))
    written = cache.tables["full"][lease.row]
    assert slots.tolist() == (written[at // page_size] * page_size + at % page_size).tolist()
    window = cache.slots(hit, "window")
    assert window[-4:].min() >= page_size, "what the window needs is there"
    with pytest.raises(KeyError, match="state"):
        cache.slots(hit, "state")


def test_make_room_evicts_the_least_or_nothing():
    cache = make(size=32)
    serve(cache, tokens((0, 16)))
    lease = start(cache, tokens((100, 12)))
    assert cache.make_room("full", 4)
    assert cache.stats().shelves[DEVICE].evicted == 0
    assert not cache.make_room("full", 24)
    assert cache.make_room("full", 20)
    assert cache.stats().shelves[DEVICE].evicted == 16
    with pytest.raises(KeyError, match="full"):
        cache.make_room("full", 1, Tier.PEER)
    cache.close(lease)
    cache.check()


def test_eviction_takes_the_tail_of_a_long_node_and_keeps_its_head():
    cache = make(size=64)
    serve(cache, tokens((0, 64)))
    serve(cache, tokens((100, 12)))
    assert cache.match(Key(tokens((0, 64)))).length == 52
    assert cache.match(Key(tokens((100, 12)))).length == 12


def test_commit_lengthens_the_leaf_of_a_decoding_request_in_place():
    cache = make()
    lease = start(cache, tokens((0, 40)), chunk=4)
    assert cache.stats().nodes == 1
    cache.close(lease)


def test_keep_false_throws_away_what_nobody_else_uses():
    cache = make()
    serve(cache, tokens((0, 8)))
    lease = start(cache, tokens((0, 24)))
    sharing = start(cache, tokens((0, 16)))
    cache.close(lease, keep=False)
    assert cache.match(Key(tokens((0, 24)))).length == 16, "the part another request pins must stay"
    cache.close(sharing)
    serve(cache, tokens((50, 20)), keep=False)
    assert cache.match(Key(tokens((50, 20)))).length == 0
    cache.check()


def test_a_hit_of_before_a_split_or_an_eviction_is_looked_up_again():
    cache = make(size=32)
    serve(cache, tokens((0, 32)))
    hit = cache.match(Key(tokens((0, 32))))
    serve(cache, tokens((0, 8), (60, 16)))
    lease = cache.open(hit)
    assert lease.cached < 32
    assert cache.tables["full"][lease.row, : lease.cached // 4].all()
    cache.check()


def test_flush_is_refused_with_live_leases_and_frees_all_without():
    cache = make()
    lease = start(cache, tokens((0, 8)))
    with pytest.raises(CacheBusy, match="1 live leases"):
        cache.flush()
    cache.close(lease)
    cache.flush()
    shelf = cache.stats().shelves[DEVICE]
    assert shelf.free == shelf.size == 64
    cache.check()


def test_reuse_off_never_hits_and_releases_windows_all_the_same():
    cache = make((full("full"), sliding_window("window", window=4)), reuse=False)
    lease = start(cache, tokens((0, 32)), chunk=8)
    assert cache.match(Key(tokens((0, 32)))).length == 0
    assert cache.stats().shelves["full", Tier.DEVICE].leased == 32
    assert cache.stats().shelves["window", Tier.DEVICE].leased == 4
    cache.close(lease)
    assert cache.stats().shelves["full", Tier.DEVICE].free == 64


def test_namespaces_do_not_share_and_are_dropped_at_once():
    cache = make()
    serve(cache, tokens((0, 16)), namespace="a")
    serve(cache, tokens((0, 12)), namespace="b")
    assert cache.match(Key(tokens((0, 16)))).length == 0
    lease = start(cache, tokens((0, 16)), namespace="a")
    assert cache.drop_namespace("a") == 16
    assert cache.match(Key(tokens((0, 16)), "a")).branch == 0
    assert cache.match(Key(tokens((0, 16)), "b")).length == 12
    cache.check()
    cache.close(lease)
    assert cache.stats().shelves[DEVICE].used == 12, "what the lease kept goes when it closes"
    cache.check()


def test_a_namespace_that_is_empty_leaves_nothing_behind():
    cache = make()
    for i in range(20):
        serve(cache, tokens((0, 3)), namespace=f"tenant {i}")
        serve(cache, tokens((0, 16)), namespace=f"other {i}", keep=False)
    held = start(cache, tokens((0, 3)), namespace="held")
    cache.drop_namespace("held")
    cache.check()
    cache.close(held)
    assert not cache._inside().tree.roots
    assert not cache._inside().tree.detached


def test_a_pin_keeps_a_prefix_until_its_time_is_over():
    cache = make(size=32)
    serve(cache, tokens((0, 16)))
    assert cache.pin(Key(tokens((0, 16))), ttl=3) == 16
    for i in range(2):
        serve(cache, tokens((100 * i + 100, 16)))
        assert cache.match(Key(tokens((0, 16)))).length == 16
    for i in range(5):
        serve(cache, tokens((100 * i + 500, 32 - 16 * (i < 2))))
    assert cache.match(Key(tokens((0, 16)))).length == 0
    cache.pin(Key(tokens((900, 32))), ttl=100)
    assert cache.unpin(Key(tokens((900, 32)))) == 1 or cache.match(Key(tokens((900, 32)))).length == 0
    cache.check()


def test_priority_keeps_what_matters():
    cache = make(size=32, policy="priority")
    vip = cache.open(cache.match(Key(tokens((0, 16)))), priority=5)
    assert cache.grow(vip, 16)
    cache.commit(vip, Key(tokens((0, 16))))
    cache.close(vip)
    for i in range(4):
        serve(cache, tokens((100 * i + 100, 16)))
    assert cache.match(Key(tokens((0, 16)))).length == 16


def test_bigram_keys_are_a_view():
    key = Key([1, 2, 3, 4], "x")
    assert key.bigrams().tokens.tolist() == [(1 << 32) | 2, (2 << 32) | 3, (3 << 32) | 4]
    assert key.bigrams().namespace == "x"
    assert len(Key([1]).bigrams()) == 0
    cache = make(page_size=1)
    serve(cache, Key(range(10)).bigrams().tokens)
    assert cache.match(Key([*range(6), 99]).bigrams()).length == 5
    with pytest.raises(RequestError, match="32"):
        Key([1 << 40, 2]).bigrams()


def test_mistakes_are_named():
    cache = make(max_length=8)
    with pytest.raises(RequestTooLarge, match="max_length=8"):
        cache.open(cache.match(Key(range(9))))
    lease = cache.open(cache.match(Key(range(8))))
    with pytest.raises(RequestTooLarge, match="max_length=8"):
        cache.grow(lease, 9)
    with pytest.raises(RequestError, match="1 tokens cannot be given back of 0"):
        cache.grow(lease, -1)
    with pytest.raises(RequestError, match="slots for 0 tokens"):
        cache.commit(lease, Key(range(4)))
    cache.close(lease)
    heir = cache.open(cache.match(Key(range(8))))
    assert heir.row == lease.row
    with pytest.raises(RequestError, match="closed already"):
        cache.close(lease)
    cache.close(heir)
    with pytest.raises(RequestError, match="dimensions"):
        Key([[1, 2]])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"page_size": 0, "capacity": {DEVICE: 8}}, "page_size=0"),
        ({"capacity": {}}, "Tier.DEVICE"),
        ({"capacity": {("other", Tier.DEVICE): 8}}, "other"),
        ({"capacity": {DEVICE: -1}}, "-1"),
        ({"capacity": {DEVICE: 8}, "policy": "best"}, "adaptive"),
        ({"capacity": {DEVICE: 8}, "write_policy": "never"}, "write_back"),
    ],
)
def test_wrong_settings_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        RadixCache([full("full")], **options)


def test_kinds_need_their_span():
    with pytest.raises(ConfigError, match="window=0"):
        sliding_window("w")
    with pytest.raises(ConfigError, match="chunk=-1"):
        chunked_local("c", chunk=-1)


@pytest.mark.parametrize("n", [0, 1, 5, 8, 9, 16, 17])
def test_the_rule(n):
    assert full("f").start(n) == 0
    assert sliding_window("w", window=8).start(n) == max(0, n - 7)
    assert chunked_local("c", chunk=8).start(n) == n // 8 * 8
    assert recurrent("r").start(n) == max(0, n - 1)


def test_check_shows_a_leak():
    cache = make()
    lease = start(cache, tokens((0, 8)))
    cache.tables["full"][lease.row, 1] = 5
    with pytest.raises(CacheBroken, match="row"):
        cache.check()


def test_throwing_away_a_request_of_a_dropped_namespace_leaves_nothing():
    """The nodes between what it added and what others added may hold nothing and go first."""
    cache = make((recurrent("state"),), page_size=1)
    serve(cache, tokens((0, 4)))
    lease = start(cache, tokens((0, 8)), chunk=2)  # two nodes of its own, with a snapshot each
    cache.learn(Lost(Key(tokens((0, 6))), Tier.DEVICE, start=4))
    cache.drop_namespace("")
    cache.close(lease, keep=False)
    cache.check()
    assert cache.stats().nodes == 0
    cache.flush()
    assert cache.stats().shelves["state", Tier.DEVICE].used == 0
