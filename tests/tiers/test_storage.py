"""A store behind the mover: by name there and back, whole or not at all; whatever it does, nobody waits for it."""

import hashlib
import threading

import numpy as np
import pytest
from stores import MemoryStore, ToldStore, file_store

from rootcellar.cache import Answer, Done, Failed, Found, Key, Move, Question, Reports, Tier, full
from rootcellar.tiers import mover as mover_module
from rootcellar.tiers.guard import Guard
from rootcellar.tiers.mover import Mover
from rootcellar.tiers.store import page_name

NBYTES = 64
ROWS = 400
PAGE_SIZE = 4


def digest(i):
    return hashlib.sha256(b"%d" % i).digest()


class Setting:
    """Host memory of two pools, one of which two kinds share, and a mover with a store behind it."""

    def __init__(self, store, **options):
        self.store = store
        self.host = {
            "arena": np.random.default_rng(0).integers(0, 256, (ROWS, NBYTES), np.uint8),
            "state": np.random.default_rng(1).integers(0, 256, (3, 2 * NBYTES), np.uint8),
        }
        self.mover = Mover({}, self.host, {"full": "arena", "window": "arena", "state": "state"})
        self.woken = threading.Semaphore(0)
        self.mover.listen(self.woken.release)
        if store is not None:
            self.mover.attach(store, **options)
        self._ids = 0

    def write(self, pages, digests=None, kind="full"):
        return self._move(Tier.HOST, Tier.STORAGE, pages, digests, kind)

    def read(self, pages, digests, kind="full"):
        return self._move(Tier.STORAGE, Tier.HOST, pages, digests, kind)

    def _move(self, src, dst, pages, digests, kind):
        self._ids += 1
        slots, there = np.array(pages, np.int32), np.arange(1, len(pages) + 1, dtype=np.int32)
        ends = (slots, there) if src is Tier.HOST else (there, slots)
        return Move(self._ids, kind, src, dst, *ends, 0, tuple(map(digest, pages if digests is None else digests)))

    def row(self, page, pool="arena"):
        return self.host[pool][page - 1].tobytes()

    def go(self, *moves, **options):
        """What becomes of them."""
        self.mover.dispatch(moves, **options)
        return self.mover.drain().events

    def lane(self, name):
        return self.mover.stats()[name]

    def check_idle(self):
        assert not self.mover.drain()
        assert self.lane("host-storage")["queued_bytes"] == self.lane("storage-host")["queued_bytes"] == 0


@pytest.fixture
def made(monkeypatch):
    """Makes settings, and ends their threads; stores that were told to wait are let go."""
    all_made = []

    def make(store, **options):
        all_made.append(Setting(store, **options))
        return all_made[-1]

    yield make
    for setting in all_made:
        if isinstance(setting.store, ToldStore) and setting.store.gate is not None:
            setting.store.gate.set()
        setting.mover.close()


@pytest.fixture
def slow(made):
    """A setting whose store waits to be let, and the store."""
    store = ToldStore(MemoryStore())
    store.gate = threading.Event()
    store.register = store.inner.register
    return made(store, most_queued=3 * NBYTES), store


def question(pages, kinds=("full",)):
    """For all these pages of each kind."""
    key = Key(np.arange(len(pages) * PAGE_SIZE, dtype=np.int32))
    named = tuple((kind, digest(page)) for kind in kinds for page in pages)
    return Question(key, Tier.STORAGE, tuple(map(full, kinds)), PAGE_SIZE, 0, (0,) * len(kinds), named)


def found(pages, kind="full"):
    return Found(Key(np.arange(pages * PAGE_SIZE, dtype=np.int32)), Tier.STORAGE, kind, 0)


def answer_to(s, asked):
    """What the store says."""
    s.mover.ask(1, asked)
    (answer,) = s.mover.drain().answers
    assert answer.serial == 1
    return [(len(event.key), event.kind) for event in answer.events]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [MemoryStore, lambda: Guard(MemoryStore()), file_store], ids=["dict", "guard", "file"])
def test_pages_go_by_name_and_come_back_elsewhere(made, kept, tmp_path):
    s = made(kept(tmp_path) if kept is file_store else kept())
    down = [s.write([3, 7]), s.write([5], [3], "window"), s.write([2], [3], "state")]
    assert set(s.go(*down)) == {Done(move.id) for move in down}
    before = {page: s.row(page) for page in (3, 7, 5)} | {"state": s.row(2, "state")}
    up = [s.read([11, 4], [7, 3]), s.read([12], [3], "window"), s.read([1], [3], "state")]
    assert set(s.go(*up)) == {Done(move.id) for move in up}
    assert (s.row(11), s.row(4), s.row(12)) == (before[7], before[3], before[5])
    assert s.row(1, "state") == before["state"]
    stats = s.mover.stats()
    for lane in ("host-storage", "storage-host"):
        counts = stats[lane]
        assert (counts["moves"], counts["pages"], counts["bytes"]) == (3, 4, 5 * NBYTES)
        assert not any(counts[field] for field in ("failed_pages", "skipped_pages", "deadline_pages"))
    assert ("store" in stats) == isinstance(s.store, Guard)
    if "store" in stats:
        assert stats["store"]["put"]["hits"] == stats["store"]["get"]["hits"] == 4
    s.check_idle()


def test_names_are_those_of_kind_and_digest(made):
    s = made(MemoryStore())
    s.go(s.write([3, 7], kind="window"))
    assert s.store.objects == {page_name("window", digest(i)): s.row(i) for i in (3, 7)}


def test_moves_go_together_in_order_as_far_as_one_call_takes_them(made):
    class Noting(MemoryStore):
        def put(self, names, blocks):
            calls.append(list(names))
            return super().put(names, blocks)

    calls = []
    s = made(store := ToldStore(Noting()), most_queued=2**20)
    store.gate = threading.Event()
    sizes = [[1], range(2, 62), range(62, 122), range(122, 140), range(140, 400)]
    moves = [s.write([*pages]) for pages in sizes]
    s.mover.dispatch(moves[:1])
    assert store.entered.wait(60)
    s.mover.dispatch(moves[1:])
    store.gate.set()
    assert s.mover.drain().events == tuple(Done(move.id) for move in moves)
    assert [len(call) for call in calls] == [1, 120, 18, 128, 128, 4]
    assert [name for call in calls for name in call] == [page_name("full", digest(i)) for i in range(1, 400)]


def test_all_of_host_memory_is_shown_to_the_store_before_the_first_call(made):
    class Registering(MemoryStore):
        def register(self, buffer):
            if broken.pop():
                raise OSError("no")
            shown.append(buffer.nbytes)

        def put(self, names, blocks):
            shown.append("put")
            return super().put(names, blocks)

    broken, shown = [False, False, True], []
    s = made(Registering())
    assert [s.go(s.write([page])) for page in (1, 2, 3)] == [(Failed(1),), (Done(2),), (Done(3),)]
    assert shown == [ROWS * NBYTES, 3 * 2 * NBYTES, "put", "put"]


def test_a_question_is_answered_with_what_the_cache_should_learn(made):
    s = made(MemoryStore())
    s.go(s.write([1, 2, 3]), s.write([1, 2], kind="window"))
    s.mover.ask(5, question(range(1, 6)))
    assert s.woken.acquire(timeout=60)
    assert s.mover.drain() == Reports((), (Answer(5, (found(3),)),))
    assert answer_to(s, question(range(1, 6), ("full", "window"))) == [(8, "full"), (8, "window")]
    assert answer_to(s, question([9, 1])) == []


def test_a_long_write_delays_neither_a_question_nor_a_load(made):
    class Slow(MemoryStore):
        def put(self, names, blocks):
            entered.set()
            assert gate.wait(60)
            return super().put(names, blocks)

    entered, gate = threading.Event(), threading.Event()
    s = made(Slow())
    s.store.objects[page_name("full", digest(7))] = s.row(7)
    s.mover.dispatch([s.write([1])])
    assert entered.wait(60)
    s.mover.ask(1, question([7]))
    s.mover.dispatch([load := s.read([2], [7])])
    events, answers = (), ()
    while not (events and answers):
        assert s.woken.acquire(timeout=60)
        reports = s.mover.reports()
        events, answers = events + reports.events, answers + reports.answers
    assert (events, answers) == ((Done(load.id),), (Answer(1, (found(1),)),))
    gate.set()
    assert s.mover.drain().events == (Done(1),)


def test_news_of_a_store_wakes_once_until_it_was_taken(slow):
    s, store = slow
    s.mover.dispatch([s.write([1]), s.read([2], [1])])
    s.mover.ask(1, question([3]))
    assert not s.woken.acquire(blocking=False)
    store.gate.set()
    assert s.woken.acquire(timeout=60)
    with s.mover._news.changed:
        assert s.mover._news.changed.wait_for(lambda: not s.mover._news.under_way, 60)
    assert not s.woken.acquire(blocking=False)
    assert len(s.mover.reports().events) == 2
    s.mover.ask(2, question([3]))
    assert s.woken.acquire(timeout=60)


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_read_that_failed_is_never_reported_as_loaded(made):
    """Of several loads in one call each has its own end."""
    s = made(MemoryStore())
    s.go(s.write([1, 2, 3, 5]))
    loads = [s.read([11, 12], [1, 2]), s.read([13, 14, 15], [3, 4, 5]), s.read([16], [5]), s.read([17], [4])]
    assert s.go(*loads) == (Done(2), Failed(3), Done(4), Failed(5))
    assert s.lane("storage-host")["failed_pages"] == 4
    s.check_idle()


def test_a_load_of_many_calls_is_given_up_at_its_first_missing_page(made):
    s = made(store := ToldStore(MemoryStore()))
    s.go(s.write([*range(1, 301)]))
    del store.inner.objects[page_name("full", digest(100))]
    calls = store.calls
    assert s.go(s.read([*range(1, 301)], range(1, 301))) == (Failed(2),)
    assert store.calls == calls + 1


def test_a_batch_that_lost_its_first_pages_is_a_contiguous_prefix_or_nothing(made):
    class Forgetful(MemoryStore):
        def put(self, names, blocks):
            super().put(names[2:], blocks[2:])
            return [False] * 2 + [True] * (len(names) - 2)

    s = made(Forgetful())
    assert s.go(s.write([1, 2, 3, 4])) == (Failed(1),)
    assert answer_to(s, question([1, 2, 3, 4])) == []
    MemoryStore.put(s.store, [page_name("full", digest(1))], [memoryview(s.row(1))])
    assert answer_to(s, question([1, 2, 3, 4])) == [(4, "full")]


def test_a_piece_whose_parent_is_missing_is_not_found(made):
    s = made(MemoryStore())
    s.go(s.write([1, 2, 4, 5]))
    assert answer_to(s, question([1, 2, 3, 4, 5])) == [(8, "full")]
    s.go(s.write([3]))
    assert answer_to(s, question([1, 2, 3, 4, 5])) == [(20, "full")]


# --- what breaks ------------------------------------------------------------------------------------------------------


def test_one_exception_of_a_store_kills_no_thread_and_its_pages_are_reported(made):
    s = made(store := ToldStore(MemoryStore()))
    store.error = OSError("the cable is out")
    assert set(s.go(s.write([1, 2]), s.read([3], [1]))) == {Failed(1), Failed(2)}
    assert answer_to(s, question([1])) == []
    assert (s.lane("host-storage")["failed_pages"], s.lane("storage-host")["failed_pages"]) == (2, 1)
    store.error = None
    assert s.go(s.write([1, 2])) == (Done(3),)
    assert s.go(s.read([3], [1])) == (Done(4),)
    assert answer_to(s, question([1])) == [(4, "full")]
    s.check_idle()


@pytest.mark.parametrize("answer", [[], [True] * 3, None, 7], ids=["nothing", "too much", "none", "a number"])
def test_an_answer_of_the_wrong_form_is_a_failure(made, answer):
    s = made(store := ToldStore(MemoryStore()))
    s.go(s.write([1, 2]))
    store.answer = answer if answer is not None else [None, None]
    assert set(s.go(s.write([1, 2]), s.read([3, 4], [1, 2]))) == {Failed(2), Failed(3)}
    assert answer_to(s, question([1, 2])) == []
    s.check_idle()


def test_a_prefetch_that_nobody_waits_for_any_more_leaves_no_count_behind(slow):
    """Whatever becomes of it, it is reported, once."""
    s, store = slow
    for i in range(5):
        s.mover.dispatch([s.read([i + 1], [i])])
        s.mover.ask(i, question([i]))
    store.error = OSError("no")
    store.gate.set()
    reports = s.mover.drain()
    assert sorted(event.move for event in reports.events) == [1, 2, 3, 4, 5]
    assert [answer.serial for answer in reports.answers] == [0, 1, 2, 3, 4]
    assert s.mover._news.under_way == 0
    s.check_idle()


# --- what is slow -----------------------------------------------------------------------------------------------------


def test_a_store_slower_than_the_writes_skips_and_counts_and_host_pages_come_free(slow):
    s, store = slow
    moves = [s.write([page]) for page in range(1, 11)]
    s.mover.dispatch(moves)
    assert s.woken.acquire(timeout=60)
    assert s.mover.reports().events == tuple(Failed(move.id) for move in moves[3:])
    assert s.lane("host-storage")["skipped_pages"] == 7
    assert s.lane("host-storage")["queued_bytes"] == 3 * NBYTES
    loads = [s.read([page], [page]) for page in range(11, 16)]
    s.mover.dispatch(loads)  # which are never skipped
    store.gate.set()
    assert set(s.mover.drain().events) == {Done(move.id) for move in moves[:3]} | {Failed(load.id) for load in loads}
    assert s.lane("storage-host")["skipped_pages"] == 0
    assert s.go(s.write([*range(1, 11)])) == (Done(16),), "too much, but nothing else waits"
    s.check_idle()


def test_half_of_host_memory_waits_for_a_store_and_that_more_did_is_said_once(made, caplog):
    store = ToldStore(MemoryStore())
    store.gate = threading.Event()
    store.register = store.inner.register
    s = made(store)
    most = sum(images.nbytes for images in s.host.values()) // 2 // NBYTES
    assert ROWS // 2 < most < ROWS
    moves = [s.write([page]) for page in range(1, ROWS + 1)]
    s.mover.dispatch(moves[:most])
    assert s.lane("host-storage")["skipped_pages"] == 0
    assert not caplog.records
    for some in (moves[most : most + 3], moves[most + 3 :]):
        s.mover.dispatch(some)
    assert s.lane("host-storage")["skipped_pages"] == ROWS - most
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the store writes more slowly than pages come"
    ]
    store.gate.set()
    kept = {Done(move.id) for move in moves[:most]}
    assert set(s.mover.drain().events) == kept | {Failed(move.id) for move in moves[most:]}
    s.check_idle()


def test_the_patient_wait_for_room(slow):
    s, store = slow
    s.mover.dispatch([s.write([1, 2, 3])])
    threading.Timer(0.01, store.gate.set).start()
    assert s.go(s.write([4, 5]), patient=True) == (Done(1), Done(2))


def test_the_patient_wait_no_longer_when_the_store_leaves(slow):
    s, store = slow
    s.mover.dispatch([s.write([1, 2, 3])])
    assert store.entered.wait(60)
    threading.Timer(0.01, s.mover.leave).start()
    s.mover.dispatch([s.write([4])], patient=True)
    assert s.mover.reports().events == (Failed(2),)
    store.gate.set()
    assert s.mover.drain().events == (Done(1),)


# --- coming and going -------------------------------------------------------------------------------------------------


def test_a_store_that_leaves_while_writes_run_is_drained_and_then_free(slow):
    s, store = slow
    before = s.host["arena"].copy()
    s.mover.dispatch([s.write([1]), s.write([2, 3]), s.read([300], [1])])
    s.mover.ask(1, question([9]))
    assert store.entered.wait(60)
    s.mover.leave()
    with pytest.raises(ValueError, match="in use"):
        s.mover.detach()
    s.mover.ask(2, question([1]))
    s.mover.dispatch([s.write([4]), s.read([301], [1])])
    reports = s.mover.reports()
    assert set(reports.events) == {Failed(4), Failed(5)}
    assert reports.answers[-1] == Answer(2, ())
    with pytest.raises(ValueError, match="leaving"):
        s.mover.attach(MemoryStore())
    threading.Timer(0.01, store.gate.set).start()
    assert s.mover.await_left(60) == 0
    reports = Reports(reports.events + s.mover.reports().events)
    assert {Done(1), Done(2)} < set(reports.events)
    assert s.mover.detach() is store
    assert s.mover.detach() is None
    assert (s.host["arena"][:299] == before[:299]).all(), "no page of the host is lost"
    assert set(store.inner.objects) == {page_name("full", digest(i)) for i in (1, 2, 3)}
    assert s.lane("host-storage")["deadline_pages"] == 0
    s.mover.attach(MemoryStore())
    assert s.go(s.write([4])) == (Done(6),)


def test_of_a_store_that_hangs_what_it_works_on_is_reported_when_it_returns(slow):
    """Until then the host's pages are its own; what it never began is given up when the time is up."""
    s, store = slow
    s.mover.dispatch([s.write([1]), s.read([300, 301], [1, 2])])
    assert store.entries.acquire(timeout=60)
    assert store.entries.acquire(timeout=60)
    s.mover.dispatch([s.write([2, 3]), s.read([302], [1])])
    s.mover.leave()
    assert s.mover.await_left(0) == 3
    assert set(s.mover.drain().events) == {Failed(3), Failed(4)}
    assert (s.lane("host-storage")["deadline_pages"], s.lane("storage-host")["deadline_pages"]) == (2, 1)
    assert s.mover.await_left(0) == 3
    with pytest.raises(ValueError, match="in use"):
        s.mover.detach()
    while s.woken.acquire(blocking=False):
        pass
    store.gate.set()
    assert s.mover.await_left(60) == 0
    assert s.woken.acquire(timeout=60)
    assert set(s.mover.reports().events) == {Done(1), Failed(2)}
    s.check_idle()
    assert s.mover.detach() is store


def test_a_move_of_many_calls_ends_after_the_one_that_the_deadline_finds(slow):
    s, store = slow
    s.mover.dispatch([s.read([*range(1, 301)], range(1, 301))])
    assert store.entered.wait(60)
    s.mover.leave()
    assert s.mover.await_left(0) == 128
    store.gate.set()
    assert s.mover.await_left(60) == 0
    assert s.mover.reports().events == (Failed(1),)
    assert store.calls == 1
    s.check_idle()


def test_every_question_is_answered_once_though_the_store_hangs(slow):
    s, store = slow
    for serial in range(3):
        s.mover.ask(serial, question([1, 2]))
    assert store.entered.wait(60)
    s.mover.leave()
    assert s.mover.reports() == Reports((), (Answer(1, ()), Answer(2, ())))
    assert s.mover.await_left(0) == 2
    assert s.mover.drain() == Reports((), (Answer(0, ()),))
    store.gate.set()
    assert s.mover.await_left(60) == 0
    assert not s.mover.drain()
    assert s.mover.detach() is store


def test_an_answer_that_comes_when_the_store_is_leaving_has_nothing_in_it(slow):
    s, store = slow
    store.inner.objects[page_name("full", digest(1))] = s.row(1)
    s.mover.ask(1, question([1]))
    assert store.entered.wait(60)
    s.mover.leave()
    store.gate.set()
    assert s.mover.await_left(60) == 0
    assert s.mover.reports() == Reports((), (Answer(1, ()),))


def test_one_store_at_a_time(made):
    s = made(MemoryStore())
    with pytest.raises(ValueError, match="is attached"):
        s.mover.attach(MemoryStore())
    with pytest.raises(ValueError, match="not told to leave"):
        s.mover.await_left(0)
    with pytest.raises(ValueError, match="in use"):
        s.mover.detach()
    s.mover.leave()
    assert s.mover.await_left(0) == 0
    assert s.mover.detach() is s.store
    s.mover.leave()
    assert s.mover.await_left(0) == 0
    assert s.go(s.write([1]), s.read([2], [1])) == (Failed(1), Failed(2))
    assert (s.lane("host-storage")["skipped_pages"], s.lane("storage-host")["skipped_pages"]) == (1, 1)


def test_a_mover_that_is_closed_leaves_a_store_that_hangs_behind(slow, monkeypatch):
    s, store = slow
    monkeypatch.setattr(mover_module, "PATIENCE", 0.0)
    s.mover.dispatch([s.write([1]), s.write([2])])
    assert store.entered.wait(60)
    s.mover.close()
    store.gate.set()
    assert store.idle.wait(60)


def test_a_mover_that_is_closed_has_written_what_was_queued(made):
    s = made(MemoryStore())
    s.mover.dispatch([s.write([page]) for page in range(1, 30)])
    s.mover.close()
    assert len(s.store.objects) == 29
