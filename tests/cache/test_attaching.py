"""A tier comes and goes while requests run: what keeps it from being forgotten, and what is written to it and when."""

from __future__ import annotations

import pytest
from helpers import land, make, push_out, serve, start, tokens, up

from rootcellar.cache import Done, Failed, Found, Key, Tier, full, recurrent, sliding_window
from rootcellar.errors import CacheBusy, ConfigError

pytestmark = pytest.mark.usefixtures("core")

DEVICE, HOST, STORAGE, PEER = Tier


def test_only_what_touches_a_tier_keeps_it_from_being_forgotten():
    cache = make(tiers=(HOST, STORAGE, PEER))
    key = Key(tokens((0, 16)))
    serve(cache, key.tokens)
    land(cache)
    lease = start(cache, tokens((0, 16), (90, 8)))
    cache.send(key)
    serve(cache, tokens((100, 8)))
    (down,) = cache.moves()
    assert (down.src, down.dst) == (DEVICE, HOST)
    cache.forget_tier(STORAGE)
    cache.forget_tier(PEER)
    assert cache.stats().shelves["full", STORAGE].used == 0
    with pytest.raises(CacheBusy, match="HOST cannot be emptied with 0 live leases and 1 copies"):
        cache.forget_tier(HOST)
    with pytest.raises(CacheBusy, match="DEVICE cannot be emptied with 1 live leases and 2 copies"):
        cache.forget_tier(DEVICE)
    cache.learn(Done(down.id))
    with pytest.raises(CacheBusy, match="HOST cannot be emptied with 0 live leases and 1 copies"):
        cache.forget_tier(HOST)
    (on,) = cache.moves()
    assert (on.src, on.dst) == (HOST, STORAGE)
    cache.learn(Failed(on.id))
    cache.forget_tier(HOST)
    cache.check()
    assert cache.stats().shelves["full", HOST].used == 0
    assert cache.match(key).length == 16, "the device keeps what it has"
    cache.close(lease)
    cache.check()


def test_a_copy_that_waits_for_another_keeps_its_tiers_too():
    cache = make(tiers=(HOST, STORAGE))
    cache.learn(Found(Key(tokens((0, 16))), STORAGE))
    lease = cache.open(cache.match(Key(tokens((0, 16)))), STORAGE)
    for tier in (DEVICE, HOST, STORAGE):
        with pytest.raises(CacheBusy):
            cache.forget_tier(tier)
    up(cache, STORAGE, HOST)
    cache.forget_tier(STORAGE)
    with pytest.raises(CacheBusy, match="0 live leases and 1 copies"):
        cache.forget_tier(HOST)
    up(cache, HOST, DEVICE)
    assert lease.ready
    cache.forget_tier(HOST)
    assert (cache.match(Key(tokens((0, 16)))).length, lease.ready) == (16, True)
    cache.check()


def test_pins_stay_unless_the_device_is_forgotten():
    cache = make(tiers=(HOST, STORAGE))
    key = Key(tokens((0, 16)))
    serve(cache, key.tokens)
    land(cache)
    assert cache.pin(key, 1000) == 16
    cache.forget_tier(HOST)
    cache.forget_tier(STORAGE)
    push_out(cache)
    assert cache.match(key).length == 16
    cache.forget_tier(DEVICE)
    assert cache.unpin(key) == 0
    cache.check()


def test_a_dropped_namespace_that_a_lease_holds_is_forgotten_too():
    cache = make(tiers=(HOST,))
    lease = start(cache, tokens((0, 16)), namespace="lora")
    assert cache.save() == 1
    land(cache)
    assert cache.drop_namespace("lora") == 16
    cache.forget_tier(HOST)
    assert cache.stats().shelves["full", HOST].used == 0
    cache.close(lease)
    cache.check()


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_nothing_is_written_to_a_tier_that_is_closed(policy):
    cache = make(size=16, tiers=(HOST, STORAGE), capacity={("full", HOST): 64}, write_policy=policy, closed=[HOST])
    key = Key(tokens((0, 16)))
    serve(cache, key.tokens)
    assert cache.save() == 0
    serve(cache, tokens((100, 16)))
    assert land(cache) == 0, "neither as requests leave nor as entries do"
    cache.learn(Found(key, STORAGE))
    assert cache.prefetch(cache.match(key)).tokens == 16
    assert land(cache) == 1, "loading is not writing"
    cache.write_to(STORAGE, False)
    cache.write_to(HOST, True)
    serve(cache, tokens((200, 16)))
    serve(cache, tokens((300, 16)))
    up(cache, DEVICE, HOST)
    assert not cache.moves(), "what arrived on HOST does not go on"
    assert cache.save(STORAGE) == (policy == "write_back"), "the device's newest, to HOST"
    cache.check()


def test_a_copy_that_was_under_way_when_its_tier_was_closed_still_lands():
    cache = make(tiers=(HOST, STORAGE))
    serve(cache, tokens((0, 16)))
    up(cache, DEVICE, HOST)
    cache.write_to(STORAGE, False)
    up(cache, HOST, STORAGE)
    assert cache.stats().shelves["full", STORAGE].cached == 16


def test_only_tiers_that_are_there_and_written_to_are_closed():
    cache = make(tiers=(HOST, PEER))
    for tier in (DEVICE, STORAGE, PEER):
        with pytest.raises(ConfigError, match=f"nothing is written to {tier.name}: name HOST or STORAGE"):
            cache.write_to(tier, True)
        with pytest.raises(ConfigError, match=f"nothing is written to {tier.name}: name HOST or STORAGE"):
            make(tiers=(HOST, PEER), closed=(tier,))


def test_what_a_store_was_not_given_it_gets_when_the_prefix_is_used_again():
    kinds = (full("full"), sliding_window("window", window=6), recurrent("state"))
    cache = make(kinds, tiers=(HOST, STORAGE), closed=(STORAGE,))
    key = Key(tokens((0, 16)))
    serve(cache, key.tokens)
    assert land(cache) == 3
    cache.write_to(STORAGE, True)
    serve(cache, key.tokens)
    moves = cache.moves()
    assert {move.kind: (move.src, move.dst, len(move.src_slots)) for move in moves} == {
        "full": (HOST, STORAGE, 4), "window": (HOST, STORAGE, 2), "state": (HOST, STORAGE, 1),
    }  # fmt: skip
    serve(cache, key.tokens)
    assert not cache.moves(), "they are under way"
    for move in moves:
        cache.learn(Failed(move.id))  # the store was slow
    serve(cache, tokens((0, 16), (90, 4)))
    assert {(move.src, move.dst) for move in cache.moves()} == {(HOST, STORAGE), (DEVICE, HOST)}


def test_what_a_store_lacks_is_written_after_as_many_hits_as_what_the_host_lacks():
    selective = {"write_policy": "write_through_selective", "write_hits": 2}
    cache = make(tiers=(HOST, STORAGE), closed=(STORAGE,), **selective)
    serve(cache, tokens((0, 16)))
    assert cache.save() == 1
    land(cache)
    cache.write_to(STORAGE, True)
    for expected in (0, 1, 0):
        serve(cache, tokens((0, 16)))
        assert land(cache) == expected
