"""Kinds that draw their device pages from one arena."""

from __future__ import annotations

import pytest
from helpers import RadixCache, make, serve, start, tokens

from rootcellar.cache import Done, Key, Tier, full, recurrent, sliding_window
from rootcellar.cache.radix import PyRadixCache
from rootcellar.errors import ConfigError

pytestmark = pytest.mark.usefixtures("core")

FULL, WINDOW = full("full"), sliding_window("window", window=8)


def shared(kinds=(FULL, WINDOW), size=64, **options) -> PyRadixCache:
    """A cache whose kinds share ``size`` tokens of pages (4 each)."""
    return RadixCache(
        kinds,
        page_size=4,
        capacity={("arena", Tier.DEVICE): size},
        arenas={"arena": [kind.name for kind in kinds]},
        max_length=4096,
        **options,
    )


def shelf(cache, kind):
    return cache.stats().shelves[kind, Tier.DEVICE]


def test_pages_of_all_kinds_come_from_one_allocator():
    cache = shared()
    lease = start(cache, tokens((0, 16)))
    rows = [cache.tables[kind.name][lease.row].tolist() for kind in cache.kinds]
    assert len({page for row in rows for page in row if page}) == 4 + 2  # the window's first two pages are released
    assert shelf(cache, "full").used == shelf(cache, "window").used == 16
    assert shelf(cache, "full").free == shelf(cache, "window").free == 64 - 32
    assert cache.available_tokens() == (64 - 32 + 8) // 2, "two kinds take a page each; two of the window's may leave"
    cache.close(lease)
    cache.check()


def test_what_one_kind_does_not_need_another_may_have():
    """Nearly the whole arena serves one long request; halves for each kind would hold little more than half of it."""
    cache = shared(size=128)
    lease = start(cache, tokens((0, 104)), chunk=8)
    assert lease.length == 104
    cache.close(lease)
    halves = make((FULL, WINDOW), size=64)
    assert not halves.grow(halves.open(halves.match(Key(tokens((0, 1))))), 68)
    cache.check()


def test_a_refused_grow_takes_nothing_of_any_kind():
    cache = shared(size=32)
    lease = cache.open(cache.match(Key([1])))
    before = cache.stats()
    assert not cache.grow(lease, 20)  # 5 pages of each of two kinds, and there are 8
    assert cache.stats() == before
    assert cache.grow(lease, 16)
    cache.close(lease)
    cache.check()


def test_the_least_valuable_entry_of_all_kinds_leaves_first():
    cache = shared(size=64)
    serve(cache, tokens((0, 16)))
    serve(cache, tokens((100, 16)))
    lease = start(cache, tokens((200, 8)))  # room comes from window pages that serve no request's end
    cache.close(lease)
    for first in (0, 100):
        assert cache.match(Key(tokens((first, 20)))).length == 16
    assert shelf(cache, "window").evicted > 0
    assert shelf(cache, "full").evicted == 0
    cache.check()


def test_states_share_with_pages():
    cache = shared((FULL, recurrent("state")), size=24)
    lease = start(cache, tokens((0, 12)))  # 3 pages, the state to write, and a snapshot
    assert shelf(cache, "state").used == 2
    assert shelf(cache, "full").free == 24 - 5 * 4
    cache.close(lease)
    cache.check()


def test_two_snapshots_of_one_arena_do_not_evict_each_other():
    cache = shared((FULL, recurrent("a"), recurrent("b")), size=28)
    lease = start(cache, tokens((0, 8)))
    assert cache.match(Key(tokens((0, 8)))).length == 8
    cache.close(lease)
    cache.check()


def test_an_arena_may_have_room_on_the_host_too():
    """What one kind leaves there another may take; and what was evicted from the device comes back from it."""
    cache = RadixCache(
        (FULL, WINDOW),
        page_size=4,
        capacity={("arena", Tier.DEVICE): 128, ("arena", Tier.HOST): 64},
        arenas={"arena": ["full", "window"]},
    )
    serve(cache, tokens((0, 40)))
    moves = cache.moves()
    assert [(m.kind, len(m.src_slots)) for m in moves] == [("full", 10), ("window", 2)]
    assert len({page for move in moves for page in move.dst_slots.tolist()}) == 12
    for move in moves:
        cache.learn(Done(move.id))
    cache.check()
    host = {kind: cache.stats().shelves[kind, Tier.HOST] for kind in ("full", "window")}
    assert {kind: (s.size, s.free, s.cached) for kind, s in host.items()} == {
        "full": (64, 16, 40), "window": (64, 16, 8),
    }  # fmt: skip
    cache.forget_tier(Tier.DEVICE)
    assert cache.match(Key(tokens((0, 40)))).reach(Tier.HOST) == 40
    cache.check()


@pytest.mark.parametrize(
    ("arenas", "capacity", "words"),
    [
        ({"full": ["full", "window"]}, {("full", Tier.DEVICE): 64}, "a name that no kind has"),
        ({"arena": ["full", "window"]}, {}, r"capacity\['arena', Tier.DEVICE\]"),
        ({"arena": ["full", "wide"]}, {("arena", Tier.DEVICE): 64}, "names 'wide'"),
        ({"arena": ["full"], "other": ["full"]}, {("arena", Tier.DEVICE): 64, ("other", Tier.DEVICE): 64}, "in one"),
        ({"arena": ["full"]}, {("arena", Tier.DEVICE): 64, ("full", Tier.DEVICE): 64}, "out of"),
        ({"arena": ["full"]}, {("arena", Tier.DEVICE): 64}, r"lacks \('window'"),
        (
            {"arena": ["full", "window"]},
            {("arena", Tier.DEVICE): 64, ("arena", Tier.HOST): 64, ("full", Tier.HOST): 64},
            "'full' room on HOST by itself and in an arena",
        ),
    ],
)
def test_wrong_arenas_are_refused(arenas, capacity, words):
    with pytest.raises(ConfigError, match=words):
        RadixCache((FULL, WINDOW), capacity=capacity, arenas=arenas)
