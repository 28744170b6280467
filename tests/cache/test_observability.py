"""What the cache says of itself: explanations, events, numbers, the printed tree."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, astuple
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from helpers import make, serve, start, tokens
from hypothesis import given
from hypothesis import strategies as st

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
    assert (second.block_size, second.medium) == (4, "GPU")
    cache.flush()
    assert cache.take_events() == [AllBlocksCleared()]
    assert make().take_events() == []


@pytest.fixture
def msgspec():
    return pytest.importorskip("msgspec", reason="needs msgspec, of requirements/lock.txt")


def _as_vllm_reads(msgspec: Any, array_like: bool) -> list[type]:
    """The events of vLLM's readers: maps on the wire, or arrays whose order is that of the fields."""
    stored = [
        ("block_hashes", list[bytes | int]),
        ("parent_block_hash", bytes | int | None),
        ("token_ids", list[int]),
        ("block_size", int),
        ("lora_id", int | None),
        ("medium", str | None),
        ("lora_name", str | None),
        ("extra_keys", list[tuple[Any, ...] | None] | None, None),
        ("group_idx", int | None, None),
        ("kv_cache_spec_kind", str | None, None),
        ("kv_cache_spec_sliding_window", int | None, None),
    ]
    removed = [("block_hashes", list[bytes | int]), ("medium", str | None), ("group_idx", int | None, None)]
    events = {"BlockStored": stored, "BlockRemoved": removed, "AllBlocksCleared": []}
    return [msgspec.defstruct(name, fields, tag=True, array_like=array_like) for name, fields in events.items()]


def _as_sglang_reads(msgspec: Any) -> list[type]:
    """SGLang's: arrays that may be longer than what is read of them."""
    stored = [
        ("block_hashes", list[bytes]),
        ("parent_block_hash", bytes | None),
        ("token_ids", list[int]),
        ("block_size", int),
        ("lora_id", int | None),
        ("medium", str | None, None),
    ]
    events = {"BlockStored": stored, "BlockRemoved": [("block_hashes", list[bytes])], "AllBlocksCleared": []}
    return [msgspec.defstruct(name, fields, tag=True, array_like=True) for name, fields in events.items()]


def _some_events() -> list:
    """One of each: a window's pages of a namespace, all of which go again."""
    cache = make((sliding_window("window", window=64),), events=True)
    serve(cache, tokens((0, 8)), namespace="cache_salt=a")
    cache.drop_namespace("cache_salt=a")
    cache.flush()
    return cache.take_events()


@pytest.mark.parametrize("array_like", [True, False], ids=["arrays", "maps"])
def test_vllms_readers_find_every_field(msgspec, array_like):
    kinds = _as_vllm_reads(msgspec, array_like)
    decoder = msgspec.msgpack.Decoder(list[kinds[0] | kinds[1] | kinds[2]])
    events = _some_events()
    words = [[type(e).__name__, *astuple(e)] if array_like else {"type": type(e).__name__, **asdict(e)} for e in events]
    stored, removed, cleared = decoder.decode(msgspec.msgpack.encode(words))
    assert stored.block_hashes == removed.block_hashes == digests(Key(range(8), "cache_salt=a"), 4)
    assert (stored.parent_block_hash, stored.token_ids, stored.block_size) == (None, list(range(8)), 4)
    assert (stored.lora_id, stored.lora_name) == (None, None)
    assert stored.medium == removed.medium == "GPU"
    assert stored.extra_keys == [("cache_salt=a",)] * 2
    assert stored.group_idx == removed.group_idx == 0
    assert (stored.kv_cache_spec_kind, stored.kv_cache_spec_sliding_window) == ("sliding_window", 64)
    assert type(cleared).__name__ == "AllBlocksCleared"


def test_sglangs_readers_find_theirs(msgspec):
    kinds = _as_sglang_reads(msgspec)
    words = [[type(event).__name__, *astuple(event)] for event in _some_events()]
    decoder = msgspec.msgpack.Decoder(list[kinds[0] | kinds[1] | kinds[2]])
    stored, removed, cleared = decoder.decode(msgspec.msgpack.encode(words))
    assert stored.block_hashes == removed.block_hashes == digests(Key(range(8), "cache_salt=a"), 4)
    assert (stored.lora_id, stored.medium) == (None, "GPU")
    assert type(cleared).__name__ == "AllBlocksCleared"


def test_events_say_whose_pages_they_are():
    cache = make((recurrent("state"), sliding_window("window", window=8), full("full")), events=True)
    serve(cache, tokens((0, 16)))
    events = cache.take_events()
    assert {(e.group_idx, e.kv_cache_spec_kind, e.kv_cache_spec_sliding_window) for e in events} == {
        (2, "full_attention", None)
    }
    assert {e.extra_keys for e in events} == {(None,) * 4}


def test_digests_are_there_from_the_commit_on_when_asked_for():
    key = Key(tokens((0, 20)))
    for wanted in (False, True):
        cache = make(digests=wanted, fingerprint=b"m")
        serve(cache, key.tokens, chunk=8)
        (node,) = walk(cache._inside().tree)
        assert node.digests == (digests(key, 4, b"m") if wanted else [])


def test_digests_are_those_of_the_definition():
    for page_size in (1, 4, 16, 48):
        ids = np.arange(8 * page_size - 1) * 1000
        ids[3 * page_size] = 1 << 40  # page 3 does not fit 4 bytes a token

        def name(i, page_size=page_size, ids=ids):
            """Page ``i``'s, as digest.py says it."""
            if i < 0:
                head = page_size.to_bytes(8, "little") + (5).to_bytes(8, "little")
                return sha256(b"rootcellar.page.v3" + head + b"model" + b"tenant").digest()
            first = i - i % 2
            pages = [ids[page * page_size : (page + 1) * page_size].tolist() for page in range(first, i + 1)]
            widths = [4 if max(page) < 1 << 32 else 8 for page in pages]
            text = b"".join(
                token.to_bytes(width, "little") for page, width in zip(pages, widths, strict=True) for token in page
            )
            return sha256(text + name(first - 1) + bytes([widths[0] + 16 * sum(widths[1:])])).digest()

        assert digests(Key(ids, "tenant"), page_size, b"model") == [name(i) for i in range(7)]


def test_equal_bytes_in_pages_of_other_widths_have_other_digests():
    two_narrow, one_wide = [1, 5, 2, 0], [1 + (5 << 32), 2]
    narrow_wide, wide_narrow = [1, 5, 2 + (6 << 32), 7], [1 + (5 << 32), 2 + (6 << 32), 7, 0]
    for one, other in ((two_narrow, one_wide), (narrow_wide, wide_narrow)):
        assert digests(Key(one), 2)[-1] != digests(Key(other), 2)[-1]


@given(data=st.data())
def test_digests_do_not_depend_on_how_the_tree_grew(data):
    """Edges begin at odd pages and are cut there; check() hashes each way at once."""
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    cache = make(page_size=page_size, digests=True, size=128 * page_size)
    for _ in range(data.draw(st.integers(1, 6))):
        pages = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
        prompt = [page for page in pages for _ in range(page_size)]
        serve(cache, prompt, chunk=data.draw(st.integers(1, 5 * page_size)))
        assert all(len(node.digests) == node.size for node in walk(cache._inside().tree))
    cache.check()


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


def test_the_tree_view_shows_shared_nodes_first_and_parents_before_children():
    cache = make(size=400)
    for tail in (100, 200, 300):
        serve(cache, tokens((0, 16), (tail, 16)))
    serve(cache, tokens((500, 16)))
    view = cache.tree()
    assert view.total == len(view.nodes) == 5
    assert view.tick == cache.tick == 4
    shared = view.nodes[0]
    assert (shared.parent, shared.start, shared.length, shared.children) == (0, 0, 16, 3)
    assert shared.head == tuple(range(16))
    assert shared.held == {("full", Tier.DEVICE): 16}
    assert shared.hits == 2
    shown = {0}
    for node in view.nodes:
        assert node.parent in shown
        shown.add(node.id)
    assert [node.id for node in cache.tree(limit=2).nodes] == [node.id for node in view.nodes[:2]]
    assert cache.tree(limit=2).total == 5
    assert view.nodes[-1].hits == 0
    cache.check()


def test_the_tree_view_puts_what_is_in_use_before_what_was_hit_more_often():
    cache = make(size=400)
    for _ in range(3):
        serve(cache, tokens((0, 16)))
    lease = start(cache, tokens((100, 16)))
    first, second = cache.tree().nodes
    assert (first.in_use, first.hits, first.head[0]) == (True, 0, 100)
    assert (second.in_use, second.hits, second.head[0]) == (False, 2, 0)
    cache.close(lease)
    assert [node.head[0] for node in cache.tree().nodes] == [0, 100]
    cache.check()


def test_the_tree_view_knows_namespaces_tiers_and_long_edges():
    cache = make(size=400, capacity={("full", Tier.HOST): 400})
    serve(cache, tokens((0, 64)), namespace="a")
    for move in cache.moves():
        cache.learn(Done(move.id))
    serve(cache, tokens((0, 8)), namespace="b")
    a, b = sorted(cache.tree().nodes, key=lambda node: node.namespace)
    assert (a.namespace, b.namespace) == ("a", "b")
    assert a.held == {("full", Tier.DEVICE): 64, ("full", Tier.HOST): 64}
    assert len(a.head) == 32
    cache.check()


def test_a_trail_names_the_nodes_that_a_prompt_goes_through():
    cache = make(size=400)
    serve(cache, tokens((0, 16), (100, 16)))
    serve(cache, tokens((0, 16), (200, 16)))
    before = cache.tree()
    one, other = (cache.trail(Key(tokens((0, 16), (tail, 16)))) for tail in (100, 200))
    assert len(one) == len(other) == 2
    assert one[0] == other[0] == before.nodes[0].id
    assert one[1] != other[1]
    assert cache.trail(Key(tokens((0, 18)))) == one[:1]
    assert cache.trail(Key(tokens((900, 18)))) == ()
    assert cache.tree() == before


def test_evictions_are_told_once_with_their_ages():
    cache = make(size=32)
    serve(cache, tokens((0, 32)))
    serve(cache, tokens((0, 32)))
    serve(cache, tokens((100, 16)))
    assert cache.tick == 3
    (gone,) = cache.take_evictions()
    assert (gone.kind, gone.tier, gone.tokens) == ("full", Tier.DEVICE, 16)
    assert (gone.created, gone.used, gone.tick) == (1, 2, 3)
    assert cache.take_evictions() == []
    cache.check()
