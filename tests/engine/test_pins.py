"""What is kept for tenants: how long, of how much, and what gives way to what."""

import numpy as np
import pytest

from rootcellar.cache import Key, RadixCache, Tier, full
from rootcellar.engine.pins import Pins
from rootcellar.errors import RequestTooLarge

PAGE = 4


class Kept:
    """A cache of 80 pages, of which pins may hold 40, whatever they name being there."""

    def __init__(self):
        tokens = 80 * PAGE
        self.cache = RadixCache(
            [full("full")], page_size=PAGE, capacity={("full", Tier.DEVICE): tokens}, max_leases=2, max_length=tokens
        )
        self.pins = Pins(self.cache, tokens)

    def add(self, pages, ends=10.0, tenant="t", share=1.0, **how):
        """Keep a prompt of these pages; how many pages are."""
        tokens, _ = self.pins.add(tenant, self.key(pages), ends, share, **how)
        self.cache.check()
        return tokens // PAGE

    def key(self, pages):
        key = Key(np.repeat(np.asarray(pages, np.int64), PAGE), "")
        lease = self.cache.open(self.cache.match(key))
        self.cache.grow(lease, len(key) - lease.length)
        self.cache.commit(lease, key)
        self.cache.close(lease)
        return key

    def now(self):
        """By sort: whose, of which pages."""
        found = {}
        for tenant, key, sort in self.pins._pins:
            found.setdefault(sort, set()).add((tenant, tuple(key.tokens[::PAGE].tolist())))
        return found


def test_a_conversation_is_kept_once_by_its_longest():
    kept = Kept()
    for pages in ([1, 2, 3], [7, 8, 9], [1, 2, 4], [1, 2, 3, 4, 5]):
        assert kept.add(pages, sort="kept") == len(pages)
    assert kept.now() == {"kept": {("t", (7, 8, 9)), ("t", (1, 2, 4)), ("t", (1, 2, 3, 4, 5))}}
    assert kept.add([7, 8, 9], tenant="u", sort="kept") == 3
    with pytest.raises(RequestTooLarge, match="may hold 160"):
        kept.add([7, 8, 9, *range(100, 140)], sort="kept")
    assert ("t", (7, 8, 9)) in kept.now()["kept"], "what there was stays"
    assert kept.add([1, 2, 3, 4, 5, 6], ends=5.0, sort="kept") == 6
    assert ("t", (1, 2, 3, 4, 5)) in kept.now()["kept"], "the shorter lasts longer"


def test_what_was_promised_longer_is_not_let_go_of_sooner():
    kept = Kept()
    kept.add([1, 2], ends=100.0, sort="kept")
    kept.add([1, 2], ends=20.0, sort="kept")
    assert kept.pins.next_end == 100.0
    kept.add([1, 2], ends=20.0)
    kept.add([1, 2], ends=15.0)
    assert kept.pins.next_end == 15.0, "a pin counts from when it was made last"


def test_a_request_lets_go_of_nobodys_pin():
    """Who has no name has the administrator's: that a request keeps the same prompt for less ends no pin."""
    kept = Kept()
    kept.add([1, 2, 3], ends=100.0, tenant="")
    kept.add([1, 2, 3], ends=10.0, tenant="", sort="kept")
    kept.add([1, 2, 3, 4], ends=10.0, tenant="", sort="kept")
    kept.pins.expire(50.0)
    assert kept.now() == {"pin": {("", (1, 2, 3))}}
    assert kept.cache.stats().shelves["full", Tier.DEVICE].pinned == 3 * PAGE


def test_a_tenant_keeps_so_many_and_its_oldest_make_room(monkeypatch):
    monkeypatch.setattr("rootcellar.engine.pins._MOST_KEPT", 2)
    kept = Kept()
    kept.add([9], tenant="u", sort="kept")
    for page in range(4):
        kept.add([page], sort="kept")
    assert kept.now() == {"kept": {("u", (9,)), ("t", (2,)), ("t", (3,))}}


def test_a_pin_that_is_refused_has_let_go_of_nothing():
    kept = Kept()
    kept.add(range(10), sort="retained")
    kept.add([90, 91], sort="kept")
    before = kept.now()
    for sort in ("pin", "kept"):
        with pytest.raises(RequestTooLarge):
            kept.add([90, 91, *range(200, 240)], sort=sort)
        assert kept.now() == before
    assert kept.add(range(300, 340), clip=True) == 40 - 2, "what is only retained gives way, what is kept does not"
