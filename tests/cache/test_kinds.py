"""Hybrid models: what is a hit, what is pinned, what leaves first."""

from __future__ import annotations

import pytest
from helpers import make, serve, start, tokens

from rootcellar.cache import Key, Tier, chunked_local, full, recurrent, sliding_window
from rootcellar.cache.check import walk

pytestmark = pytest.mark.usefixtures("core")


def used(cache, kind, what="cached"):
    return getattr(cache.stats().shelves[kind, Tier.DEVICE], what)


def test_a_running_request_pins_only_its_window():
    cache = make((full("full"), sliding_window("window", window=5)))
    lease = start(cache, tokens((0, 32)), chunk=8)
    assert used(cache, "full", "pinned") == 32
    assert used(cache, "window", "pinned") == 4
    row = cache.tables["window"][lease.row]
    assert row[7] > 0
    assert not row[:7].any()
    cache.close(lease)


def test_a_window_pool_far_smaller_than_the_context_is_enough():
    cache = make((full("full"), sliding_window("window", window=8)), size=256, capacity={("window", Tier.DEVICE): 24})
    lease = start(cache, tokens((0, 240)), chunk=8)
    cache.close(lease)
    assert cache.match(Key(tokens((0, 250)))).length == 240


def test_window_pages_inside_an_edge_leave_before_those_at_its_end():
    cache = make((full("full"), sliding_window("window", window=4)), size=256, capacity={("window", Tier.DEVICE): 40})
    for first in (0, 1000, 2000):
        serve(cache, tokens((first, 32)))
    for first in (0, 1000, 2000):
        assert cache.match(Key(tokens((first, 32), (7, 1)))).length == 32, "the ends, where requests stopped, survive"


def test_full_pages_that_serve_no_boundary_leave_first():
    cache = make((full("full"), sliding_window("window", window=8)), size=64, capacity={("window", Tier.DEVICE): 24})
    for first in (0, 100, 200):
        serve(cache, tokens((first, 16)), chunk=4)
    tree = cache._inside().tree
    (shelf,) = tree.full_shelves
    damage = {int(node.tokens[0]): tree.ranking.damage(node, shelf, node.entries[shelf.index]) for node in walk(tree)}
    resumable = {first: cache.match(Key(tokens((first, 16)))).length == 16 for first in damage}
    assert resumable == {0: False, 100: True, 200: True}
    assert damage == {0: 0, 100: 2, 200: 2}


def test_chunked_attention_resumes_at_a_chunk_edge_with_no_chunk_pages_at_all():
    kinds = (full("full"), chunked_local("chunk", chunk=16))
    cache = make(kinds, size=64, capacity={("chunk", Tier.DEVICE): 16})
    lease = start(cache, tokens((0, 32)), chunk=8)
    assert used(cache, "chunk", "pinned") == 0
    cache.close(lease)
    serve(cache, tokens((100, 16)))
    assert cache.match(Key(tokens((0, 40)))).length == 32


def test_chunked_attention_falls_back_to_the_last_chunk_edge():
    cache = make((full("full"), chunked_local("chunk", chunk=16)), size=64, capacity={("chunk", Tier.DEVICE): 16})
    serve(cache, tokens((0, 24)), chunk=8)
    assert cache.match(Key(tokens((0, 30)))).length == 24
    serve(cache, tokens((100, 12)))
    hit = cache.match(Key(tokens((0, 30))))
    assert hit.length == 16
    assert hit.branch in (16, 24)


class TestRecurrent:
    def make(self, states: int = 8):
        kinds = (full("full"), recurrent("state"))
        return make(kinds, size=128, capacity={("state", Tier.DEVICE): states})

    def test_a_snapshot_is_a_hit_and_nothing_between_is(self):
        cache = self.make()
        serve(cache, tokens((0, 32)))
        assert cache.match(Key(tokens((0, 40)))).length == 32
        hit = cache.match(Key(tokens((0, 20), (70, 9))))
        assert (hit.length, hit.branch) == (0, 20)

    def test_a_snapshot_at_the_branching_point_serves_the_next_request(self):
        cache = self.make()
        serve(cache, tokens((0, 16), (100, 16)))
        key = Key(tokens((0, 16), (200, 16)))
        hit = cache.match(key)
        lease = cache.open(hit)
        assert cache.grow(lease, hit.branch)
        cache.commit(lease, key[: hit.branch])
        assert cache.grow(lease, 16)
        cache.commit(lease, key)
        cache.close(lease)
        assert cache.match(Key(tokens((0, 16), (300, 16)))).length == 16

    def test_a_resumed_request_reads_the_trees_state_and_writes_its_own(self):
        cache = self.make()
        serve(cache, tokens((0, 16)))
        leases = [cache.open(cache.match(Key(tokens((0, 16), (50 + i, 9))))) for i in range(2)]
        (read, write), (other_read, other_write) = (cache.tables["state"][lease.row] for lease in leases)
        assert read == other_read > 0
        assert len({int(read), int(write), int(other_write)}) == 3
        assert cache.grow(leases[0], 4)
        assert cache.tables["state"][leases[0].row].tolist() == [read, write]
        assert cache.grow(leases[0], 4)
        assert cache.tables["state"][leases[0].row].tolist() == [write, write]
        cache.check()

    def test_handing_over_a_snapshot_moves_the_write_elsewhere(self):
        cache = self.make()
        lease = start(cache, tokens((0, 16)))
        read, write = cache.tables["state"][lease.row]
        assert read != write
        assert cache.stats().shelves["state", Tier.DEVICE].cached == 1
        cache.close(lease)

    def test_no_snapshot_off_a_page_or_when_not_wanted(self):
        cache = self.make()
        lease = start(cache, tokens((0, 15)))
        assert cache.stats().shelves["state", Tier.DEVICE].cached == 0
        assert cache.grow(lease, 1)
        cache.commit(lease, Key(tokens((0, 16))), snapshot=False)
        assert cache.stats().shelves["state", Tier.DEVICE].cached == 0
        cache.close(lease)

    def test_inner_snapshots_of_a_conversation_leave_before_its_end(self):
        cache = self.make(states=4)
        lease = start(cache, tokens((0, 12)), chunk=4)  # three snapshots and the one being written
        cache.close(lease)
        serve(cache, tokens((100, 4)))
        serve(cache, tokens((200, 4)))
        assert cache.match(Key(tokens((0, 12)))).length == 12

    def test_open_is_refused_without_a_free_state(self):
        cache = self.make(states=2)
        leases = [cache.open(cache.match(Key([i]))) for i in range(3)]
        assert leases[0] is not None
        assert leases[1] is not None
        assert leases[2] is None


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_window_one_needs_nothing(page_size):
    cache = make((full("full"), sliding_window("one", window=1)), size=96, page_size=page_size)
    lease = start(cache, tokens((0, 48)))
    assert cache.stats().shelves["one", Tier.DEVICE].pinned == 0
    cache.close(lease)
    assert cache.match(Key(tokens((0, 60)))).length == 48
