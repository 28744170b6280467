"""What prompts that wait would find cached leaves last of all, what is wanted last first; nothing of it stays."""

from __future__ import annotations

import pytest
from helpers import KINDS, cached, land, make, serve, tokens

from rootcellar.cache import NEVER, Key, Tier, full, recurrent
from rootcellar.cache.check import walk

pytestmark = pytest.mark.usefixtures("core")


def awaited(cache):
    """Tokens of nodes that somebody waits for."""
    return sum(node.size for node in walk(cache._inside().tree) if any(node.turns)) * cache.page_size


@pytest.mark.parametrize("policy", ["lru", "lfu", "mru", "adaptive"])
@pytest.mark.parametrize("kinds", KINDS)
def test_who_waits_goes_before_what_is_expected_and_the_first_in_line_before_the_others(kinds, policy):
    cache = make(KINDS[kinds], size=80, policy=policy)
    over, first, second, expected, plain = (Key(tokens((100 * i, 16))) for i in range(5))
    for key in (first, second, expected, plain, over):
        serve(cache, key.tokens)
    assert cache.expect(expected, 10) == cache.expect(over, NEVER) == cache.expect(second, NEVER) == 16
    assert cache.foresee([first, Key(tokens((900, 16))), second]) == 32
    cache.check()
    left = []
    for step in range(5):
        assert all(cache.make_room(kind.name, 16 * (step + 1)) for kind in cache.kinds if kind.rule != "recurrent")
        if kinds == "state":  # 8 of them, 5 in use
            assert cache.make_room("state", 4 + step)
        names = zip("ofsep", (over, first, second, expected, plain), strict=True)
        left.append("".join(name for name, key in names if not cached(cache, key)))
    assert left == ["o", "op", "oep", "osep", "ofsep"]
    cache.check()


def test_what_was_said_before_is_over_when_it_is_said_anew():
    cache = make(size=64)
    one, two, three = (Key(tokens((100 * i, 16))) for i in range(3))
    for key in (one, two, three):
        serve(cache, key.tokens)
    cache.foresee([one, two])
    assert cache.foresee([two]) == awaited(cache) == 16
    cache.make_room("full", 48)
    assert (cached(cache, one), cached(cache, two), cached(cache, three)) == (0, 16, 0)
    assert cache.foresee([]) == awaited(cache) == 0
    serve(cache, three.tokens)
    cache.make_room("full", 48)
    assert (cached(cache, two), cached(cache, three)) == (0, 16)


def test_of_a_long_answer_only_what_the_prompt_shares_is_kept():
    """The way is cut where the prompt leaves it, so that what comes after can leave first, page by page."""
    cache = make(size=64)
    serve(cache, tokens((0, 32)))
    assert cache.foresee([Key(tokens((0, 18), (500, 8)))]) == 16
    serve(cache, tokens((100, 16)))
    cache.make_room("full", 32)
    assert cached(cache, Key(tokens((0, 32)))) == 16


def test_a_state_that_one_continues_is_kept_for_another_who_waits():
    """A state with one continuation leaves before others, unless somebody waits to part there."""
    cache = make((full("full"), recurrent("state")), size=128)
    trunk, other = Key(tokens((0, 16))), Key(tokens((300, 16)))
    for key in (trunk, Key(tokens((0, 32))), other):
        serve(cache, key.tokens)
    assert cache.foresee([Key(tokens((0, 16), (50, 8)))]) == 16
    cache.make_room("state", 7)
    assert (cached(cache, trunk), cached(cache, other)) == (16, 0)
    cache.check()


def test_no_more_is_kept_than_the_device_holds_and_the_first_in_line_have_it():
    """Those behind wait for what would have to leave for the others anyway."""
    cache = make(size=64, tiers=(Tier.HOST,), capacity={("full", Tier.HOST): 256}, write_policy="write_back")
    keys = [Key(tokens((100 * i, 16))) for i in range(8)]
    for key in keys:
        serve(cache, key.tokens)
        land(cache)
    assert cache.foresee(keys) == awaited(cache) == 64
    reaches = [cache.match(key).reach(Tier.HOST) for key in keys]
    assert reaches == [16] * 8
    assert cache.make_room("full", 192, Tier.HOST)
    assert [cache.match(key).reach(Tier.HOST) for key in keys[:4]] == [16] * 4


def test_a_namespace_that_is_dropped_leaves_nobody_waiting():
    cache = make(size=64)
    serve(cache, tokens((0, 16)), namespace="old")
    serve(cache, tokens((0, 16)))
    cache.foresee([Key(tokens((0, 16)), "old"), Key(tokens((0, 16)))])
    cache.drop_namespace("old")
    assert awaited(cache) == 16
    cache.flush()
    assert awaited(cache) == 0
    assert cache.foresee([Key(tokens((0, 16)))]) == 0
    cache.check()
