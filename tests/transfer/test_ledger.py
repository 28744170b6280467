"""A manifest that grows: what is due, what is held, what will not come."""

import numpy as np

from rootcellar.cache import Manifest, Part
from rootcellar.transfer.ledger import Ledger


def name(i):
    return bytes([i]) * 32


def manifest(ident, first, stop, kind="full"):
    """Pages ``[first, stop)``, whose slots on the device are 100 more."""
    part = Part(kind, first, np.arange(100 + first, 100 + stop), tuple(name(i) for i in range(first, stop)))
    return Manifest(ident, stop, (part,))


def pages(first, stop, kind="full"):
    return [(kind, name(i)) for i in range(first, stop)]


def test_a_page_is_due_once_it_was_offered_and_asked_for_in_any_order():
    ledger = Ledger()
    ledger.offer(manifest(1, 0, 2))
    assert ledger.take_due(9) == ("", [])
    ledger.want(pages(1, 4))
    assert ledger.take_due(9) == ("full", [(0, 101)])
    ledger.offer(manifest(2, 2, 4))
    assert ledger.take_due(1) == ("full", [(1, 102)])
    assert ledger.take_due(9) == ("full", [(2, 103)])
    assert ledger.take_due(9) == ("", [])


def test_due_pages_are_taken_kind_by_kind():
    ledger = Ledger()
    ledger.want([*pages(0, 2), *pages(0, 1, "window"), *pages(2, 3)])
    ledger.offer(manifest(1, 0, 1, "window"))
    ledger.offer(manifest(2, 0, 3))
    assert ledger.take_due(9) == ("window", [(2, 100)])
    assert ledger.take_due(9) == ("full", [(0, 100), (1, 101), (3, 102)])


def test_what_was_offered_is_held_until_all_that_was_asked_for_of_it_has_arrived():
    ledger = Ledger()
    for ident, first in ((1, 0), (2, 2), (3, 4)):
        ledger.offer(manifest(ident, first, first + 2))
    assert ledger.let_go() == [], "nobody asked yet"
    ledger.want(pages(1, 4))
    assert ledger.let_go() == [3], "of which nothing was asked for"
    assert ledger.manifests == [1, 2]
    ledger.arrived([0, 1])
    assert ledger.let_go() == [1]
    ledger.arrived([0, 1, 7])  # again, or nothing of ours
    assert ledger.let_go() == []
    ledger.arrived([2])
    assert ledger.let_go() == [2]
    assert ledger.manifests == []


def test_what_was_never_offered_is_missing_when_there_will_be_no_more():
    ledger = Ledger()
    ledger.want(pages(0, 3))
    ledger.offer(manifest(1, 1, 2))
    assert ledger.take_missing() == []
    ledger.end()
    assert ledger.take_missing() == [0, 2]
    assert ledger.take_missing() == []
    ledger.want(pages(2, 3))
    assert ledger.take_missing() == [3]
    assert ledger.take_due(9) == ("full", [(1, 101)])


def test_a_page_asked_for_twice_is_sent_twice():
    ledger = Ledger()
    ledger.want(pages(0, 1) * 2)
    ledger.offer(manifest(1, 0, 1))
    assert ledger.take_due(9) == ("full", [(0, 100), (1, 100)])
    ledger.arrived([0])
    assert ledger.let_go() == []
    ledger.arrived([1])
    assert ledger.let_go() == [1]
