"""Pages of a real cache, of both cores, go to a store and come back: the same bytes or none, and nothing is stuck."""

import threading

import numpy as np
import pytest
from stores import MemoryStore, ToldStore
from traffic import CORES, FINGERPRINT, PAGE, Traffic, prompt

from rootcellar.cache import Key, Tier, digests
from rootcellar.tiers.faulty import Faults, FaultyStore
from rootcellar.tiers.guard import Guard, GuardSettings
from rootcellar.tiers.store import page_name
from rootcellar.tiers.stores import open_store

HOST, STORAGE = Tier.HOST, Tier.STORAGE


@pytest.fixture(params=CORES)
def traffic(request):
    """Makes traffic over one of the cores, and ends its threads."""
    made = []

    def make(store=None, **options):
        made.append(Traffic(request.param, store, **options))
        return made[-1]

    yield make
    for each in made:
        each.mover.close()


def names_of(ids, kind="full"):
    return [page_name(kind, digest) for digest in digests(Key(ids), PAGE, FINGERPRINT)]


def test_what_was_written_down_is_found_prefetched_and_loaded_after_a_restart(traffic, tmp_path):
    store = open_store("file", {"path": str(tmp_path), "min_free_space": 0, "max_size": "4MiB"}, "model")
    t = traffic(store)
    lengths = {1: 41, 2: 30, 3: 9}
    for which, length in lengths.items():
        assert t.serve(prompt(which, length)) == 0
    t.settle()
    t.mover.leave()
    assert t.mover.await_left(60) == 0
    t.take(t.mover.reports())
    t.mover.detach().close()
    t.check_idle()
    t = traffic(open_store("file", {"path": str(tmp_path), "min_free_space": 0, "max_size": "4MiB"}, "model"))
    for which, length in lengths.items():
        ids, whole = prompt(which, length), length // PAGE * PAGE
        assert t.cache.match(Key(ids)).reach(STORAGE) == 0
        assert t.ask(ids)
        t.settle()
        assert t.cache.match(Key(ids)).reach(STORAGE) == whole
        prefetch = t.cache.prefetch(t.cache.match(Key(ids)))
        assert prefetch.tokens == whole
        t.settle()
        assert t.cache.pending(prefetch) == 0
        assert t.cache.match(Key(ids)).reach(HOST) == whole
        assert t.serve(ids, HOST) == whole
        assert not t.ask(ids), "all of it is known"
    assert not t.failed
    t.mover.leave()
    t.check_idle()
    assert t.mover.await_left(0) == 0
    t.mover.detach().close()


def test_the_device_and_the_host_forget_and_the_store_has_it(traffic):
    t = traffic(Guard(MemoryStore()))
    ids = prompt(1, 50)
    t.serve(ids)
    t.settle()
    t.forget(Tier.DEVICE, HOST)
    assert t.cache.match(Key(ids)).reach(STORAGE) == 48
    assert t.serve(ids, STORAGE) == 48, "by way of the host"
    t.forget(Tier.DEVICE)
    assert t.serve(ids, HOST) == 48
    assert not t.failed
    t.check_idle()


def test_slots_of_a_prefetch_that_an_insert_made_superfluous_are_held_until_it_is_acknowledged(traffic):
    store = ToldStore(MemoryStore())
    t = traffic(store, host=48)
    ids = prompt(1, 41)
    t.serve(ids)
    t.settle()
    t.forget(Tier.DEVICE, HOST)
    store.gate = threading.Event()
    t.cache.prefetch(t.cache.match(Key(ids)))
    loads = t.dispatch()
    assert store.entered.wait(60)
    pending = {slot for move in loads if move.dst is HOST and move.kind != "state" for slot in move.dst_slots.tolist()}
    assert t.serve(ids) == 0  # computes, and inserts, what is on its way
    t.dispatch()
    for which in range(2, 6):  # and others want the host's room
        t.serve(prompt(which, 41))
        moves = t.dispatch()
        taken = {
            slot for move in moves if move.dst is HOST and move.kind != "state" for slot in move.dst_slots.tolist()
        }
        assert not taken & pending
        t.take(t.mover.reports())
    store.gate.set()
    t.settle()
    t.forget(Tier.DEVICE)
    t.serve(ids, HOST)
    t.check_idle()


def test_a_prefetched_piece_whose_parent_is_missing_is_contiguous_or_dropped(traffic):
    store = MemoryStore()
    t = traffic(store)
    for length in (25, 49):  # two nodes
        t.serve(prompt(1, length))
    t.settle()
    t.forget(Tier.DEVICE, HOST)
    del store.objects[names_of(prompt(1, 49))[1]]
    prefetch = t.cache.prefetch(t.cache.match(Key(prompt(1, 49))))
    assert prefetch.tokens == 48
    t.settle()
    assert t.failed
    assert t.cache.match(Key(prompt(1, 49))).reach(STORAGE) == 0
    assert t.serve(prompt(1, 49), STORAGE) == 0
    t.check_idle()


def test_an_abort_during_a_prefetch_leaves_nothing_behind_and_the_next_one_works(traffic):
    store = ToldStore(MemoryStore())
    t = traffic(store)
    ids = prompt(1, 41)
    t.serve(ids)
    t.settle()
    for _ in range(5):
        t.forget(Tier.DEVICE, HOST)
        store.gate = threading.Event()
        store.entered.clear()
        prefetch = t.cache.prefetch(t.cache.match(Key(ids)))
        lease = t.open(ids)
        t.dispatch()
        assert store.entered.wait(60)
        t.cache.close(lease)
        store.gate.set()
        t.settle()
        assert t.cache.pending(prefetch) == 0
        assert t.cache.match(Key(ids)).reach(HOST) == 40
    t.check_idle()


def test_a_store_that_raises_frees_the_host_and_serving_goes_on(traffic):
    store = ToldStore(MemoryStore())
    t = traffic(store, host=96)
    store.error = OSError("the cable is out")
    for which in range(8):
        t.serve(prompt(which, 41))
        t.settle()
    assert t.failed
    assert t.cache.make_room("full", 64, HOST), "every page may leave"
    store.error = None
    t.serve(prompt(9, 41))
    t.settle()
    t.forget(Tier.DEVICE, HOST)
    assert t.serve(prompt(9, 41), STORAGE) == 40
    t.check_idle()


def test_a_store_that_hangs_keeps_no_room_of_the_device(traffic):
    store = ToldStore(MemoryStore())
    t = traffic(store, device=48, host=1000)
    store.gate = threading.Event()
    for which in range(12):
        assert t.serve(prompt(which, 41)) == 0
        t.dispatch()
        t.take(t.mover.reports())
    while not store.entered.wait(0.001):
        t.take(t.mover.reports())
        t.dispatch()
    store.gate.set()
    t.settle()
    t.check_idle()


def test_pages_that_a_write_back_lost_cost_what_comes_after_them(traffic):
    store = MemoryStore()
    t = traffic(store, write_policy="write_back")
    ids = prompt(1, 81)
    t.serve(ids)
    for which in range(2, 5):
        t.serve(prompt(which, 81))
        t.settle()
    lost = names_of(ids)[0]
    assert store.objects.pop(lost)
    t = traffic(store)
    t.ask(ids)
    t.settle()
    assert t.cache.match(Key(ids)).reach(STORAGE) == 0
    assert t.serve(ids, STORAGE) == 0
    t.check_idle()


def test_a_store_that_leaves_while_writes_run_costs_the_host_no_page(traffic):
    store = ToldStore(MemoryStore())
    store.register = store.inner.register
    t = traffic(store)
    store.gate = threading.Event()
    for which in range(4):
        t.serve(prompt(which, 41))
        t.dispatch()
        t.take(t.mover.reports())
    while not store.entered.wait(0.001):
        t.dispatch()
        t.take(t.mover.reports())
    t.mover.leave()
    assert t.mover.await_left(0) > 0
    t.serve(prompt(4, 41))
    store.gate.set()
    assert t.mover.await_left(60) == 0
    t.settle()
    assert t.mover.detach() is store
    t.forget(Tier.DEVICE, STORAGE)
    for which in range(5):
        assert t.serve(prompt(which, 41), HOST) == 40
    t.check_idle()


def test_a_read_that_failed_is_computed_again(traffic):
    inner = MemoryStore()
    t = traffic(Guard(inner))
    ids = prompt(1, 41)
    t.serve(ids)
    t.settle()
    t.forget(Tier.DEVICE, HOST)
    name = names_of(ids)[3]
    inner.objects[name] = inner.objects[names_of(ids)[4]]  # another's page
    assert t.serve(ids, STORAGE) == 8, "what came before it is good"
    assert t.failed
    assert t.mover.stats()["store"]["get"]["damaged"] == 1
    assert t.serve(ids, STORAGE) == 40
    t.check_idle()


FAULTS = Faults(delay=0.1, fail=0.1, short=0.1, flip=0.02, lie=0.2, late=0.0005)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 12))])
def test_whatever_a_store_does_no_request_reads_other_bytes_and_everything_is_reported_once(traffic, seed):
    rng = np.random.default_rng(seed)
    inner = MemoryStore()
    store = FaultyStore(inner, FAULTS, seed)

    def guard():
        return Guard(store, GuardSettings(failures=20, pause=0.001, deadline=5.0))

    policy = ("write_through", "write_back")[seed % 2]
    t = traffic(guard(), device=96, host=int(rng.integers(48, 300)), write_policy=policy)
    given = 0
    for _ in range(250):
        ids = prompt(int(rng.integers(6)), int(rng.integers(1, 81)))
        match int(rng.integers(10)):
            case 0 | 1 | 2 | 3:
                given += t.serve(ids, Tier(int(rng.integers(3)))) or 0
            case 4:
                t.ask(ids)
            case 5:
                t.cache.prefetch(t.cache.match(Key(ids)))
            case 6:
                if (lease := t.open(ids)) is not None:
                    t.dispatch()
                    t.cache.close(lease)
            case 7:
                t.settle()
                t.forget(*rng.permutation([Tier.DEVICE, HOST, STORAGE])[: int(rng.integers(1, 4))].tolist())
                t.ask(ids)
                t.settle()
                given += t.serve(ids, STORAGE) or 0
            case 8:
                t.take(t.mover.reports())
            case _:
                t.mover.leave()
                t.serve(ids, STORAGE)
                assert t.mover.await_left(0 if rng.integers(2) else 60) >= 0
                assert t.mover.await_left(60) == 0
                t.mover.detach()
                t.mover.attach(guard())
        t.dispatch()
    assert given
    assert t.mover.stats()["storage-host"]["pages"]
    assert t.failed
    assert sum(store.seen.values()) > 20, store.seen
    t.check_idle()
