"""Stores and peers: what is asked of them, and what they are offered."""

from __future__ import annotations

import random

import numpy as np
import pytest
from helpers import land, make, serve, start, tokens
from world import KIND_MIXES

from rootcellar.cache import (
    Done,
    Failed,
    Found,
    Key,
    Tier,
    digests,
    full,
    recurrent,
    sliding_window,
)
from rootcellar.errors import CacheBusy

pytestmark = pytest.mark.usefixtures("core")

HOST, STORAGE, PEER = Tier.HOST, Tier.STORAGE, Tier.PEER


def test_a_store_is_asked_for_what_would_make_the_hit_longer():
    kinds = (full("full"), sliding_window("window", window=6), recurrent("state"))
    cache = make(kinds, tiers=(HOST, STORAGE), capacity={("full", STORAGE): 256}, fingerprint=b"m")
    key = Key(tokens((0, 42)), "tenant")
    names = digests(key, 4, b"m")
    question = cache.ask(key)
    assert (question.reach, question.firsts) == (0, (0, 0, 0))
    assert list(question.pages) == [(kind.name, name) for kind in kinds for name in names]
    # All of full attention, the window from page 4 on, the state after page 8 and the one after page 3.
    states = (7, 2)
    held = [kind != "window" or names.index(name) >= 4 for kind, name in question.pages[:20]]
    found = question.answer([*held, *(page in states for page in range(10))])
    assert [(event.kind, len(event.key), event.start) for event in found] == [
        ("full", 32, 0), ("window", 32, 24), ("state", 32, 28),
    ]  # fmt: skip
    for event in found:
        cache.learn(event)
    assert cache.match(key).reach(STORAGE) == 32
    again = cache.ask(key)
    assert (again.reach, again.firsts) == (32, (8, 8, 8)), "the window begins in a page that is there"
    assert again.answer([False] * len(again.pages)) == []
    pages = {name: shelf.cached for (name, tier), shelf in cache.stats().shelves.items() if tier is STORAGE}
    assert pages == {"full": 32, "window": 8, "state": 1}
    cache.check()


def test_a_store_is_not_asked_for_what_nearer_tiers_have_or_what_it_never_keeps():
    cache = make(tiers=(HOST, STORAGE), write_policy="write_back")
    key = Key(tokens((0, 32)))
    serve(cache, key.tokens)
    assert cache.ask(key) is None
    longer = Key(tokens((0, 32), (90, 11)))
    question = cache.ask(longer)
    assert (question.reach, question.firsts, len(question.pages)) == (32, (8,), 2)
    (found,) = question.answer([True, False])
    assert (len(found.key), found.start) == (36, 32)
    cache.learn(found)
    assert cache.match(longer).reach(STORAGE) == 36
    assert cache.stats().shelves["full", STORAGE].cached == 4, "it was not told of more"
    assert make(tiers=(HOST,)).ask(key) is None
    assert make(tiers=(HOST, STORAGE), reuse=False).ask(key) is None
    mixed = make((full("full"), recurrent("state")), tiers=(HOST,), capacity={("full", STORAGE): 64})
    assert mixed.ask(key) is None, "no boundary gets its state from there"
    cache.check()


def test_a_long_run_is_found_in_pieces_and_what_has_come_of_it_is_used():
    cache = make(size=1024, tiers=(HOST, STORAGE))
    key = Key(tokens((0, 802)))
    serve(cache, key.tokens[:16])
    question = cache.ask(key)
    found = question.answer([True] * 190 + [False] * 6)
    assert [(len(event.key) // 4, event.start) for event in found] == [(4 + 64, 16), (4 + 128, 16), (194, 16)]
    for event in found:
        cache.learn(event)
        assert cache.match(key).reach(STORAGE) == len(event.key)
    prefetch = cache.prefetch(cache.match(key))
    moves = [move for move in cache.moves() if move.src is STORAGE]
    assert [(move.first, len(move.dst_slots)) for move in moves] == [(4, 64), (68, 64), (132, 62)]
    for move in moves[:2]:
        cache.learn(Done(move.id))
    assert (cache.match(key).reach(HOST), cache.pending(prefetch)) == (4 * 132, 2), "one is to copy what the device has"
    cache.check()


def test_of_several_kinds_that_need_all_pages_each_is_found_by_itself():
    kinds = (full("a"), full("b"), sliding_window("window", window=6))
    cache = make(kinds, tiers=(HOST, STORAGE))
    key = Key(tokens((0, 40)))
    question = cache.ask(key)
    found = question.answer([True] * 30, piece=4)
    assert [(event.kind, len(event.key)) for event in found] == [
        ("a", 16), ("b", 16), ("a", 32), ("b", 32), ("a", 40), ("b", 40), ("window", 40),
    ]  # fmt: skip
    for event in found:
        cache.learn(event)
    assert cache.match(key).reach(STORAGE) == 40
    cache.check()


def remembered(cache) -> tuple[set, dict]:
    """All that a cache holds, page by page, whatever the nodes; and how much of what."""
    tree = cache._inside().tree
    held = set()
    stack = [((), child) for root in tree.roots.values() for child in root.children.values()]
    while stack:
        above, node = stack.pop()
        tokens = above + tuple(node.tokens.tolist())
        stack += [(tokens, child) for child in node.children.values()]
        for shelf in tree.shelves:
            entry = node.entries[shelf.index]
            for i in range(len(entry.pages) if entry else 0):
                last = tokens[: (node.start + entry.lo + i + 1) * cache.page_size]
                held.add((shelf.kind.name, shelf.tier, last))
    return held, cache.stats().shelves


def before_asking(cache, seed: int) -> list[list[int]]:
    """Prompts that share prefixes, served; what is left of them is on several tiers."""
    rng = random.Random(seed)
    prompts: list[list[int]] = [[]]
    for _ in range(5):
        old = rng.choice(prompts)
        prompts.append(old[: rng.randint(0, len(old))] + [rng.randrange(2) for _ in range(rng.randint(1, 60))])
        serve(cache, np.array(prompts[-1]), chunk=rng.randint(1, 30))
        if rng.random() < 0.6:
            land(cache, Done if rng.random() < 0.8 else Failed)
            cache.forget_tier(rng.choice(list(Tier)))
    land(cache)
    return prompts


@pytest.mark.parametrize("mix", range(len(KIND_MIXES)))
def test_pieces_learned_in_order_leave_what_one_event_a_kind_would(mix):
    kinds = KIND_MIXES[mix]
    room = {(kind.name, tier): 1024 for kind in kinds for tier in (Tier.DEVICE, HOST, STORAGE)}
    learned = 0
    for seed in range(12):
        rng = random.Random(seed)
        ours, other = (make(kinds, page_size=2, tiers=(HOST, STORAGE, PEER), capacity=room) for _ in range(2))
        prompts = before_asking(ours, seed)
        assert before_asking(other, seed) == prompts
        old = rng.choice(prompts)
        prompts.append(old[: rng.randint(0, len(old))] + [rng.randrange(2) for _ in range(rng.randint(1, 60))])
        question = ours.ask(Key(prompts[-1]))
        if question is None:
            continue
        odds = rng.choice((0.9, 0.98, 1))
        held = [rng.random() < odds for _ in question.pages]
        pieces = question.answer(held, piece=rng.randint(1, 9))
        for event in pieces:
            ours.learn(event)
            ours.check()
        whole = {event.kind: event for event in pieces}  # the last of each reaches from the first page to the end
        for event in whole.values():
            other.learn(event)
        assert remembered(ours) == remembered(other)
        for prompt in prompts:
            assert ours.match(Key(prompt)).reaches == other.match(Key(prompt)).reaches
        leases = [cache.open(cache.match(question.key), STORAGE) for cache in (ours, other)]
        assert leases[0].cached == leases[1].cached
        learned += len(pieces)
    assert learned > 5


# ---- peers ----------------------------------------------------------------------------------------------------------


def test_a_prefill_node_offers_what_a_decode_node_needs_and_no_more():
    kinds = (full("full"), sliding_window("window", window=5))
    prefill, decode = make(kinds, fingerprint=b"m"), make(kinds, tiers=(PEER,), fingerprint=b"m")
    key = Key(tokens((0, 34)))
    lease = start(prefill, key.tokens)
    manifest = prefill.send(key)
    assert manifest.tokens == 32, "whole pages"
    assert {part.kind: (part.first, list(part.digests)) for part in manifest.parts} == {
        "full": (0, digests(key, 4, b"m")), "window": (7, digests(key, 4, b"m")[7:]),
    }  # fmt: skip
    for part in manifest.parts:
        assert part.slots.tolist() == prefill.tables[part.kind][lease.row, part.first : 8].tolist()
    prefill.close(lease)
    decode.learn(Found(key, PEER))
    waiting = decode.open(decode.match(key), PEER)
    moves = decode.moves()
    assert {move.kind: move.digests for move in moves} == {part.kind: part.digests for part in manifest.parts}
    assert waiting.cached == 32
    assert prefill.send(key, 32) is None, "a peer that has all of it"
    (part,) = prefill.send(Key(key.tokens[:32]), 31).parts[:1]
    assert (part.first, len(part.slots)) == (7, 1)


def test_a_manifest_grows_as_chunks_are_committed():
    kinds = (full("full"), sliding_window("window", window=6))
    cache = make(kinds, fingerprint=b"m")
    key = Key(tokens((0, 48)))
    names = digests(key, 4, b"m")
    lease = cache.open(cache.match(key))
    sent = {"full": set(), "window": set()}
    reached = 0
    for end in (10, 24, 48):
        assert cache.grow(lease, end - lease.length)
        cache.commit(lease, key[:end])
        manifest = cache.send(key[:end], reached)
        reached = manifest.tokens
        for part in manifest.parts:
            assert not sent[part.kind] & set(part.digests), "nothing twice"
            sent[part.kind] |= set(part.digests)
    assert reached == 48
    assert sent["full"] == set(names)
    assert sent["window"] >= set(names[kinds[1].start(48) // 4 :])
    cache.check()


@pytest.mark.parametrize("end", [Done, Failed])
def test_what_is_offered_to_several_peers_stays_until_the_last_has_it(end):
    kinds = (full("full"), sliding_window("window", window=5), recurrent("state"))
    cache = make(kinds, fingerprint=b"m")
    key = Key(tokens((0, 32)))
    serve(cache, key.tokens)
    offers = [cache.send(key) for _ in range(3)]
    assert len({offer.id for offer in offers}) == 3
    slots = {part.kind: part.slots.tolist() for part in offers[0].parts}
    for offer in offers:
        assert {part.kind: part.slots.tolist() for part in offer.parts} == slots
        with pytest.raises(CacheBusy, match="copies under way"):
            cache.flush()
        for first in range(1000, 3000, 100):
            serve(cache, tokens((first, 32)))
        assert cache.match(key).length == 32
        cache.learn(end(offer.id))
    for first in range(1000, 3000, 100):
        serve(cache, tokens((first, 32)))
    assert cache.match(key).length == 0
    cache.learn(end(offers[0].id))
    cache.flush()
    cache.check()


def test_what_is_offered_of_a_dropped_namespace_stays_until_it_is_fetched():
    cache = make()
    key = Key(tokens((0, 32)), "lora")
    serve(cache, key.tokens, namespace="lora")
    manifest = cache.send(key)
    assert cache.drop_namespace("lora") == 32
    assert cache.available_tokens() == 32
    cache.learn(Done(manifest.id))
    assert cache.available_tokens() == 64
    cache.check()
