"""Tiers: what moves where, when, and what becomes of a request when a copy fails."""

from __future__ import annotations

import pytest
from helpers import land, make, push_out, serve, start, tokens, up

from rootcellar.cache import (
    Done,
    Failed,
    Found,
    Key,
    Lost,
    Tier,
    digests,
    full,
    recurrent,
    sliding_window,
)
from rootcellar.errors import CacheBusy, ConfigError

pytestmark = pytest.mark.usefixtures("core")

HOST, STORAGE, PEER = Tier.HOST, Tier.STORAGE, Tier.PEER


def test_write_through_copies_as_a_request_leaves_and_a_later_one_loads_it_back():
    cache = make(tiers=(HOST,), capacity={("full", HOST): 1024})
    serve(cache, tokens((0, 16)))
    (move,) = cache.moves()
    assert (move.src, move.dst, move.kind, len(move.src_slots)) == (Tier.DEVICE, HOST, "full", 4)
    cache.learn(Done(move.id))
    push_out(cache)
    hit = cache.match(Key(tokens((0, 20))))
    assert (hit.length, hit.reach(HOST), hit.reach(STORAGE)) == (0, 16, 16)
    lease = cache.open(hit, HOST)
    assert lease.cached == 16
    assert not lease.ready
    assert cache.stats().shelves["full", Tier.DEVICE].in_flight == 16
    (move,) = cache.moves()
    assert (move.src, move.dst) == (HOST, Tier.DEVICE)
    cache.learn(Done(move.id))
    assert lease.ready
    assert cache.tables["full"][lease.row, :4].all()
    assert cache.stats().hit_tokens_by_tier[HOST] == 16
    cache.close(lease)
    cache.check()


def test_hits_are_counted_by_tier_even_when_the_hit_was_stale():
    cache = make(size=32, tiers=(HOST,), capacity={("full", HOST): 1024})
    stale = cache.match(Key(tokens((0, 20))))
    serve(cache, tokens((0, 16)))
    land(cache)
    cache.close(cache.open(stale, HOST))
    serve(cache, tokens((100, 24)))
    cache.close(cache.open(stale, HOST))
    land(cache)
    by_tier = cache.stats().hit_tokens_by_tier
    assert (by_tier[Tier.DEVICE], by_tier[HOST]) == (16 + 8, 8)


def test_selective_writes_after_enough_hits():
    cache = make(tiers=(HOST,), write_policy="write_through_selective", write_hits=2)
    for expected in (0, 0, 1, 0):
        serve(cache, tokens((0, 16)))
        assert land(cache) == expected


def test_write_back_copies_only_what_is_evicted_and_its_slots_are_free_at_once():
    cache = make(size=16, tiers=(HOST,), capacity={("full", HOST): 64}, write_policy="write_back")
    serve(cache, tokens((0, 16)))
    assert not cache.moves()
    lease = start(cache, tokens((100, 16)))
    moves = cache.moves()
    assert sum(len(move.src_slots) for move in moves) == 4
    for move in moves:
        cache.learn(Done(move.id))
    cache.close(lease)
    assert cache.match(Key(tokens((0, 16)))).reach(HOST) == 16


def test_a_failed_load_loses_the_leases_that_wait_and_forgets_the_source():
    cache = make(tiers=(HOST,), capacity={("full", HOST): 1024})
    serve(cache, tokens((0, 16)))
    land(cache)
    push_out(cache)
    key = Key(tokens((0, 20)))
    leases = [cache.open(cache.match(key), HOST) for _ in range(2)]
    assert leases[0].waits == leases[1].waits, "two requests wait for one copy"
    land(cache, Failed)
    assert all(lease.lost and not lease.ready for lease in leases)
    for lease in leases:
        cache.close(lease)
    cache.check()
    assert cache.match(key).reach(PEER) == 0, "or the next request would load the same broken page again"


def test_a_failed_write_leaves_the_device_as_it_was():
    cache = make(tiers=(HOST,))
    serve(cache, tokens((0, 16)))
    land(cache, Failed)
    hit = cache.match(Key(tokens((0, 16))))
    assert (hit.length, hit.reach(HOST)) == (16, 16)
    assert cache.stats().shelves["full", HOST].used == 0


def test_a_tier_that_never_answers_does_not_tie_up_the_device():
    cache = make(tiers=(HOST,))
    for i in range(10):
        serve(cache, tokens((100 * i, 16)))
        cache.moves()
    assert cache.available_tokens() == 64
    cache.check()


@pytest.mark.parametrize("loading", [False, True], ids=["writing", "loading"])
def test_a_store_that_never_answers_does_not_tie_up_the_device(loading):
    cache = make(size=32, tiers=(HOST, STORAGE), capacity={("full", HOST): 64, ("full", STORAGE): 64})
    if loading:
        cache.learn(Found(Key(tokens((0, 32))), STORAGE))
        assert cache.prefetch(cache.match(Key(tokens((0, 32))))) is not None
        (move,) = cache.moves()
        serve(cache, tokens((0, 32)))  # which computes it, beside the copy
        assert not cache.moves()
    else:
        serve(cache, tokens((0, 32)))
        (down,) = cache.moves()
        cache.learn(Done(down.id))
        (move,) = cache.moves()
    assert {move.src, move.dst} == {HOST, STORAGE}
    for first in (100, 200):
        serve(cache, tokens((first, 32)))
        land_all_but(cache, move)
    shelf = cache.stats().shelves["full", Tier.DEVICE]
    assert (shelf.pinned, shelf.evictable) == (0, 32)
    assert cache.drop_namespace("") == 32  # what is being copied stays until then
    cache.check()
    cache.learn(Done(move.id))
    assert all(shelf.free == shelf.size for shelf in cache.stats().shelves.values())
    cache.check()


def land_all_but(cache, move):
    """Fail what was planned but for one move that is under way."""
    while moves := cache.moves():
        for other in moves:
            assert other.id != move.id
            cache.learn(Failed(other.id))
    cache.check()


def test_the_copy_of_a_request_that_was_aborted_still_lands():
    cache = make(tiers=(HOST,), capacity={("full", HOST): 1024})
    serve(cache, tokens((0, 16)))
    land(cache)
    push_out(cache)
    lease = cache.open(cache.match(Key(tokens((0, 16)))), HOST)
    cache.close(lease)
    with pytest.raises(CacheBusy, match="1 copies"):
        cache.flush()
    land(cache)
    assert cache.match(Key(tokens((0, 16)))).length == 16
    cache.flush()


def test_only_the_window_is_loaded_for_a_window_kind():
    kinds = (full("full"), sliding_window("window", window=5), recurrent("state"))
    cache = make(kinds, tiers=(HOST, STORAGE), capacity={("full", STORAGE): 256})
    cache.learn(Found(Key(tokens((0, 40))), STORAGE))
    hit = cache.match(Key(tokens((0, 50))))
    assert (hit.length, hit.reach(HOST), hit.reach(STORAGE)) == (0, 0, 40)
    lease = cache.open(hit, STORAGE)
    pages = {move.kind: len(move.dst_slots) for move in up(cache, STORAGE, HOST)}
    assert pages == {"full": 10, "window": 1, "state": 1}
    assert not lease.ready
    pages = {move.kind: len(move.dst_slots) for move in up(cache, HOST, Tier.DEVICE)}
    assert pages == {"full": 10, "window": 1, "state": 1}
    assert lease.ready
    assert cache.tables["state"][lease.row, 0] > 0
    cache.check()


def test_kinds_are_found_one_by_one():
    kinds = (full("full"), sliding_window("window", window=6), recurrent("state"))
    cache = make(kinds, tiers=(HOST, STORAGE), capacity={("full", STORAGE): 256})
    key = Key(tokens((0, 40)))
    for kind in kinds:
        assert cache.match(key).reach(STORAGE) == 0
        cache.learn(Found(key, STORAGE, kind.name))
    assert cache.match(key).reach(STORAGE) == 40
    pages = {name: shelf.cached for (name, tier), shelf in cache.stats().shelves.items() if tier is STORAGE}
    assert pages == {"full": 40, "window": 8, "state": 1}
    cache.learn(Lost(key, STORAGE, "state"))
    assert cache.match(key).reach(STORAGE) == 0
    cache.check()


def test_moves_to_a_store_carry_the_digests_that_name_the_pages():
    cache = make(tiers=(HOST, STORAGE), fingerprint=b"model")
    key = Key(tokens((0, 18)), "tenant")
    serve(cache, key.tokens, namespace="tenant")
    (down,) = cache.moves()
    assert down.digests == ()
    cache.learn(Done(down.id))
    (move,) = cache.moves()
    assert (move.src, move.dst) == (HOST, STORAGE)
    assert list(move.digests) == digests(key, 4, b"model")
    assert digests(key, 4, b"other") != digests(key, 4, b"model") != digests(Key(key.tokens), 4, b"model")


def test_what_a_store_lost_is_no_longer_promised():
    cache = make(tiers=(HOST, STORAGE))
    key = Key(tokens((0, 40)))
    cache.learn(Found(key, STORAGE))
    assert cache.match(key).reach(STORAGE) == 40
    cache.learn(Lost(key, STORAGE, start=16))
    assert cache.match(key).reach(STORAGE) == 16
    cache.learn(Lost(key, STORAGE))
    assert cache.match(key).branch == 0
    cache.check()


def test_loads_too_small_to_be_worth_it_are_left_alone():
    cache = make(tiers=(HOST, STORAGE), min_load={STORAGE: 24})
    cache.learn(Found(Key(tokens((0, 16))), STORAGE))
    lease = cache.open(cache.match(Key(tokens((0, 30)))), STORAGE)
    assert (lease.cached, lease.ready) == (0, True)
    cache.close(lease)
    cache.learn(Found(Key(tokens((0, 24))), STORAGE))
    lease = cache.open(cache.match(Key(tokens((0, 30)))), STORAGE)
    assert lease.cached == 24


def test_open_falls_back_to_the_device_when_the_copies_do_not_fit():
    cache = make(size=32, tiers=(HOST,), capacity={("full", HOST): 256})
    serve(cache, tokens((0, 32)))
    land(cache)
    busy = start(cache, tokens((100, 24)))
    lease = cache.open(cache.match(Key(tokens((0, 32)))), HOST)
    assert lease is not None
    assert lease.ready
    assert lease.cached <= 8
    cache.close(busy)
    cache.close(lease)


def test_a_prefetch_brings_storage_to_host():
    cache = make(tiers=(HOST, STORAGE))
    key = Key(tokens((0, 32)))
    cache.learn(Found(key, STORAGE))
    prefetch = cache.prefetch(cache.match(key))
    assert prefetch.tokens == 32
    assert cache.pending(prefetch) == 1
    land(cache)
    assert cache.pending(prefetch) == 0
    assert cache.match(key).reach(HOST) == 32
    assert cache.prefetch(cache.match(key)) is None


def test_what_storage_has_comes_up_through_the_host_one_move_after_the_other():
    cache = make(tiers=(HOST, STORAGE), fingerprint=b"m")
    key = Key(tokens((0, 32)))
    cache.learn(Found(key, STORAGE))
    leases = [cache.open(cache.match(key), STORAGE) for _ in range(2)]
    assert cache.stats().shelves["full", Tier.DEVICE].in_flight == 32, "room on the device is taken at once"
    (first,) = cache.moves()
    assert (first.src, first.dst, list(first.digests)) == (STORAGE, HOST, digests(key, 4, b"m"))
    (second,) = leases[0].waits
    cache.learn(Done(second))
    assert not leases[0].ready, "nobody was told of that move yet"
    cache.match(key[:16])
    cache.close(cache.open(cache.match(key[:16])))
    cache.learn(Done(first.id))
    (move,) = cache.moves()
    assert (move.id, move.src, move.dst, move.digests) == (second, HOST, Tier.DEVICE, ())
    assert move.src_slots.tolist() == first.dst_slots.tolist()
    assert not any(lease.ready for lease in leases)
    cache.learn(Done(move.id))
    assert all(lease.ready for lease in leases)
    assert cache.match(key).reach(HOST) == cache.match(key).length == 32
    cache.check()


def test_a_store_that_fails_loses_the_leases_and_what_was_to_follow():
    cache = make(tiers=(HOST, STORAGE))
    key = Key(tokens((0, 32)))
    cache.learn(Found(key, STORAGE))
    lease = cache.open(cache.match(key), STORAGE)
    (move,) = cache.moves()
    cache.learn(Failed(move.id))
    assert lease.lost
    assert not cache.moves()
    cache.close(lease)
    assert cache.match(key).branch == 0, "or the next request would ask for the same broken pages again"
    cache.check()
    cache.flush()


def test_a_load_joins_a_prefetch_under_way():
    cache = make(tiers=(HOST, STORAGE))
    key = Key(tokens((0, 32)))
    cache.learn(Found(key, STORAGE))
    prefetch = cache.prefetch(cache.match(key))
    lease = cache.open(cache.match(key), STORAGE)
    (move,) = up(cache, STORAGE, HOST)
    assert prefetch.moves == {move.id}
    assert cache.pending(prefetch) == 0
    up(cache, HOST, Tier.DEVICE)
    assert lease.ready


@pytest.mark.parametrize("room", [None, {"full": 8}], ids=["any", "room"])
def test_where_the_host_has_no_room_for_what_a_store_has_the_host_is_resumed_from(room):
    often = {"write_policy": "write_through_selective", "write_hits": 1}
    cache = make(tiers=(HOST, STORAGE), capacity={("full", HOST): 24}, **often)
    key = Key(tokens((0, 40)))
    for _ in range(2):
        serve(cache, key.tokens[:16])
    up(cache, Tier.DEVICE, HOST)
    up(cache, HOST, STORAGE)
    cache.learn(Found(key, STORAGE))
    for first in range(100, 500, 100):
        serve(cache, tokens((first, 16)))
    hit = cache.match(key)
    assert (hit.length, hit.reach(HOST), hit.reach(STORAGE)) == (0, 16, 40)
    lease = cache.open(hit, STORAGE, room=room)
    assert lease.cached == 16
    (move,) = cache.moves()
    assert (move.src, move.dst) == (HOST, Tier.DEVICE)


def test_a_store_needs_the_host_above_it():
    with pytest.raises(ConfigError, match="comes up through the host"):
        make(tiers=(STORAGE,))


# ---- stores ---------------------------------------------------------------------------------------------------------


def test_prefixes_saved_to_the_host_are_hits_after_the_device_is_dropped():
    cache = make(tiers=(HOST,), write_policy="write_back")
    serve(cache, tokens((0, 32)))
    lease = start(cache, tokens((0, 16), (90, 8)))
    with pytest.raises(CacheBusy, match="1 live leases"):
        cache.forget_tier(Tier.DEVICE)
    cache.close(lease)
    assert cache.save() == 3
    land(cache)
    cache.forget_tier(Tier.DEVICE)
    cache.check()
    assert cache.stats().shelves["full", Tier.DEVICE].used == 0
    hit = cache.match(Key(tokens((0, 32))))
    assert (hit.length, hit.reach(HOST)) == (0, 32)


def test_a_prefix_is_not_written_down_where_only_its_own_beginning_could_make_room():
    cache = make(tiers=(HOST,), capacity={("full", HOST): 20}, write_policy="write_back")
    serve(cache, tokens((0, 16)))
    assert cache.save() == 1
    land(cache)
    key = Key(tokens((0, 16), (90, 8)))
    serve(cache, key.tokens)
    assert cache.write_down(key) == 0
    cache.forget_tier(Tier.DEVICE)
    cache.check()
    assert cache.match(key).reach(HOST) == 16


def test_saving_to_a_store_takes_what_the_host_has_and_then_what_comes_down():
    kinds = (full("full"), sliding_window("window", window=6))
    cache = make(kinds, tiers=(HOST, STORAGE), write_policy="write_back", closed=(STORAGE,))
    serve(cache, tokens((0, 16)))
    assert cache.save() == 2
    assert land(cache) == 2
    cache.write_to(STORAGE, True)
    serve(cache, tokens((0, 16), (90, 8)))
    assert cache.save(Tier.DEVICE) == 0
    assert cache.save(STORAGE) == 4
    moves = cache.moves()
    ways = [(move.src, move.dst, move.first) for move in moves]
    assert ways == [(HOST, STORAGE, 0)] * 2 + [(Tier.DEVICE, HOST, 4)] * 2
    assert cache.save(STORAGE) == 0, "all of it is under way"
    for move in moves:
        cache.learn(Done(move.id))
    assert len(up(cache, HOST, STORAGE)) == 2
    assert cache.save(STORAGE) == 0
    held = {name: shelf.cached for (name, tier), shelf in cache.stats().shelves.items() if tier is STORAGE}
    assert held == {"full": 24, "window": 24}
    cache.check()


def test_one_prefix_is_written_down_by_name_whatever_the_policy():
    cache = make(tiers=(HOST, STORAGE), write_policy="write_back")
    serve(cache, tokens((0, 32)))
    serve(cache, tokens((100, 16)))
    assert cache.write_down(Key(tokens((500, 8)))) == 0
    assert cache.write_down(Key(tokens((0, 16), (7, 4)))) == 1
    (move,) = cache.moves()
    assert (move.src, move.dst, len(move.src_slots)) == (Tier.DEVICE, HOST, 4)
    assert cache.write_down(Key(tokens((0, 16)))) == 0  # it is on its way
    cache.learn(Done(move.id))
    (move,) = cache.moves()
    assert (move.src, move.dst, len(move.digests)) == (HOST, STORAGE, 4)
    cache.learn(Failed(move.id))
    assert cache.write_down(Key(tokens((0, 16)))) == 1
    assert land(cache) == 1
    assert cache.write_down(Key(tokens((0, 16)))) == 0
    cache.check()


def test_a_page_computed_while_its_copy_was_under_way_is_not_kept_twice():
    cache = make(tiers=(HOST, STORAGE))
    key = Key(tokens((0, 16)))
    cache.learn(Found(key, STORAGE))
    waiting = cache.open(cache.match(key), STORAGE)
    serve(cache, key.tokens)
    land(cache)
    assert waiting.ready
    assert cache.stats().shelves["full", Tier.DEVICE].used == 16
    cache.check()
    cache.close(waiting)


def test_unknown_reports_are_ignored():
    cache = make(tiers=(HOST,))
    cache.learn(Done(99))
    cache.learn(Failed(99))
    cache.learn(Lost(Key([1, 2, 3]), HOST))
    cache.check()
