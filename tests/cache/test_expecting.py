"""What is said of a prompt's future stands in the order of leaving: over, nobody knows, and wanted by a time."""

from __future__ import annotations

import pytest
from helpers import KINDS, cached, land, make, serve, tokens

from rootcellar.cache import LATEST, NEVER, Key, Tier

pytestmark = pytest.mark.usefixtures("core")


@pytest.mark.parametrize("policy", ["lru", "mru", "adaptive"])
@pytest.mark.parametrize("kinds", KINDS)
def test_what_is_over_leaves_first_and_what_is_awaited_last_by_when_it_is_wanted(kinds, policy):
    """Whatever the policy, and by kind: a window's entries and a state as well."""
    cache = make(KINDS[kinds], size=64, policy=policy)
    over, soon, late, plain = (Key(tokens((100 * i, 16))) for i in range(4))
    for key in (soon, late, plain, over):
        serve(cache, key.tokens)
    assert cache.expect(over, NEVER) == cache.expect(late, 50) == cache.expect(soon, 10) == 16
    cache.check()
    left = []
    for step in range(4):
        assert all(cache.make_room(kind.name, 16 * (step + 1)) for kind in cache.kinds if kind.rule != "recurrent")
        if kinds == "state":  # 8 of them, 4 in use
            assert cache.make_room("state", 5 + step)
        left.append(
            [name for name, key in zip("oslp", (over, soon, late, plain), strict=True) if not cached(cache, key)]
        )
    assert left == [["o"], ["o", "p"], ["o", "l", "p"], ["o", "s", "l", "p"]]
    cache.check()


def test_over_is_what_only_this_prompt_goes_on_to_until_it_is_asked_for():
    cache = make(size=64)
    one, two = Key(tokens((0, 16), (50, 8))), Key(tokens((0, 16), (70, 8)))
    serve(cache, one.tokens)
    serve(cache, two.tokens)
    assert cache.expect(Key(tokens((0, 16))), NEVER) == 0
    assert cache.expect(one, NEVER) == 8
    assert cache.expect(two, NEVER) == 24  # now nobody goes on from the rest
    cache.match(one)
    serve(cache, tokens((100, 32)))
    cache.make_room("full", 8)
    assert (cached(cache, one), cached(cache, two)) == (24, 16)
    assert cache.expect(Key(tokens((900, 8))), 5) == 0


def test_what_is_expected_of_longer_prompts_protects_what_they_begin_with_until_both_are_forgotten():
    cache = make(size=64)
    trunk, branch = Key(tokens((0, 16))), Key(tokens((0, 16), (50, 8)))
    serve(cache, branch.tokens)
    assert (cache.expect(trunk, LATEST + 5), cache.expect(branch, 7)) == (16, 24)
    assert cache.expect(trunk, 0) == 16
    serve(cache, tokens((100, 40)))
    cache.make_room("full", 40)
    assert cached(cache, branch) == 24
    assert cache.expect(branch, 0) == 24
    serve(cache, tokens((200, 40)))
    cache.make_room("full", 48)
    assert cached(cache, branch) < 24
    cache.check()


def test_what_is_over_leaves_the_device_before_the_host():
    """It is copied down first, and is there as if nothing had been said."""
    cache = make(size=32, tiers=(Tier.HOST,), write_policy="write_back")
    one, two = Key(tokens((0, 16))), Key(tokens((100, 16)))
    serve(cache, one.tokens)
    serve(cache, two.tokens)
    assert cache.write_down(two) == 1
    land(cache)
    assert cache.expect(two, NEVER) == 16
    cache.make_room("full", 16)
    hit = cache.match(two)
    assert (hit.length, hit.reach(Tier.HOST), cached(cache, one)) == (0, 16, 16)
    cache.check()
