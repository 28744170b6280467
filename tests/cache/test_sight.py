"""What the cache says of itself: explanations, events, numbers, the printed tree."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import make, serve, start, tokens

from rootcellar.cache import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Done,
    Key,
    Tier,
    digests,
    full,
    recurrent,
    sliding_window,
)
from rootcellar.cache.check import walk

pytestmark = pytest.mark.usefixtures("core")


def why(cache, key) -> str:
    return str(cache.explain(key))


def test_explain_names_the_first_token_that_differs():
    cache = make()
    serve(cache, tokens((0, 32)))
    explanation = cache.explain(Key(tokens((0, 22), (99, 10))))
    assert (explanation.branch, explanation.diverges_at) == (20, 22)
    assert "Token 22 (99)" in str(explanation)
    assert "less than a page of 4" in str(explanation)
    assert cache.explain(Key(tokens((7, 9)))).diverges_at == 0


def test_explain_says_below_one_page():
    cache = make(page_size=16)
    assert "only whole pages of 16" in why(cache, Key(tokens((0, 9))))
    serve(cache, tokens((0, 32)))
    assert "The last 4 tokens do not fill a page of 16" in why(cache, Key(tokens((0, 20))))
    own_tail = cache.explain(Key(tokens((0, 38))))
    assert own_tail.reasons == ("The last 6 tokens do not fill a page of 16.",)
    assert "All of it is cached." in why(cache, Key(tokens((0, 32))))


def test_explain_says_what_was_evicted_and_when():
    cache = make(size=32)
    serve(cache, tokens((0, 32)))
    serve(cache, tokens((100, 16)))
    explanation = why(cache, Key(tokens((0, 32))))
    assert "16 of 32 tokens" in explanation
    assert "evicted from DEVICE at tick 2" in explanation


def test_explain_names_the_kind_that_broke_the_boundary():
    kinds = (full("full"), sliding_window("window", window=8))
    cache = make(kinds, capacity={("window", Tier.DEVICE): 16})
    for first in (0, 100, 200):
        serve(cache, tokens((first, 16)), chunk=4)
    explanation = cache.explain(Key(tokens((0, 16))))
    assert explanation.broken_by == ("window",)
    assert "'window' lacks tokens 8 on at 16: evicted from DEVICE" in str(explanation)
    cache = make((full("full"), recurrent("state")))
    serve(cache, tokens((0, 16)))
    explanation = cache.explain(Key(tokens((0, 10), (9, 9))))
    assert explanation.broken_by == ("state",)
    assert "'state' lacks a state at 8: no snapshot was taken there" in str(explanation)


def test_explain_names_the_tier_and_the_namespace_that_know_more():
    cache = make(tiers=(Tier.HOST,), capacity={("full", Tier.HOST): 512})
    serve(cache, tokens((0, 16)), namespace="lora")
    for move in cache.moves():
        cache.learn(Done(move.id))
    assert "Namespace 'lora' knows 16 tokens" in why(cache, Key(tokens((0, 16))))
    for i in range(6):
        serve(cache, tokens((100 * i + 100, 16)))
    explanation = why(cache, Key(tokens((0, 16)), "lora"))
    assert "16 tokens could be resumed once HOST is loaded" in explanation
    assert "it is on HOST" in explanation


def test_explain_touches_nothing():
    cache = make(size=32)
    serve(cache, tokens((0, 16)))
    serve(cache, tokens((100, 16)))
    before = cache.stats()
    cache.explain(Key(tokens((0, 16))))
    assert cache.stats() == before
    serve(cache, tokens((200, 16)))
    assert cache.match(Key(tokens((0, 16)))).length == 0, "explaining made a prompt recent"


def test_events_rebuild_what_is_cached_on_each_medium():
    cache = make(size=48, events=True, tiers=(Tier.HOST,), fingerprint=b"m")
    held = {"GPU": set(), "CPU": set()}

    def follow():
        for event in cache.take_events():
            if isinstance(event, BlockStored):
                assert len(event.token_ids) == event.block_size * len(event.block_hashes)
                held[event.medium] |= set(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                assert set(event.block_hashes) <= held[event.medium]
                held[event.medium] -= set(event.block_hashes)
            else:
                held["GPU"].clear()
                held["CPU"].clear()

    prompts = [tokens((0, 12), (100 * i, 8 + 4 * i)) for i in range(1, 5)]
    for prompt in prompts:
        serve(cache, prompt, chunk=8)
        for move in cache.moves():
            cache.learn(Done(move.id))
        follow()
        for other in prompts:
            key = Key(other)
            known = cache.match(key).length // 4
            names = digests(key, 4, b"m")
            assert [name in held["GPU"] for name in names] == [i < known for i in range(len(names))]
    cache.flush()
    follow()
    assert held == {"GPU": set(), "CPU": set()}


def test_events_chain_through_their_parents():
    cache = make(events=True)
    serve(cache, tokens((0, 8)))
    serve(cache, tokens((0, 8), (50, 4)))
    first, second = cache.take_events()
    assert first.parent_block_hash is None
    assert second.parent_block_hash == first.block_hashes[-1]
    assert second.token_ids == (50, 51, 52, 53)
    assert (second.block_size, second.medium, second.namespace) == (4, "GPU", "")
    cache.flush()
    assert cache.take_events() == [AllBlocksCleared()]
    assert make().take_events() == []


def test_digests_are_there_from_the_commit_on_when_asked_for():
    key = Key(tokens((0, 20)))
    for wanted in (False, True):
        cache = make(digests=wanted, fingerprint=b"m")
        serve(cache, key.tokens, chunk=8)
        (node,) = walk(cache._inside().tree)
        assert node.digests == (digests(key, 4, b"m") if wanted else [])


def test_stats_add_up():
    cache = make()
    serve(cache, tokens((0, 16)))
    lease = start(cache, tokens((0, 8), (70, 5)))
    stats = cache.stats()
    shelf = stats.shelves["full", Tier.DEVICE]
    assert shelf.size == shelf.free + shelf.cached + shelf.leased + shelf.in_flight
    assert (shelf.cached, shelf.pinned, shelf.evictable, shelf.leased) == (20, 12, 8, 4)
    assert (stats.requests, stats.input_tokens, stats.hit_tokens) == (2, 29, 8)
    assert stats.hit_rate == pytest.approx(8 / 29)
    cache.close(lease)


def test_pretty_print_shows_the_tree():
    cache = make()
    serve(cache, tokens((0, 16)), namespace="lora")
    serve(cache, tokens((0, 8), (70, 5)), namespace="lora")
    text = cache.pretty_print()
    assert text.splitlines()[0] == "namespace 'lora'"
    assert "  [0, 8) 0 1 2 3 ...: full@device all; 1 hits" in text
    assert "    [8, 12) 70 71 72 73 ...:" in text
    assert "and more" in cache.pretty_print(limit=1)


def test_the_core_needs_nothing_but_numpy():
    code = "import rootcellar.cache, sys; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"jax", "jaxlib", "torch", "ml_dtypes", "scipy"} & set(loaded)
