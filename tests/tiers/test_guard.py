"""Guard: a store that fails, hangs, lies or is slow does no harm."""

import logging
import threading
import time

import numpy as np
import pytest
import xxhash
from stores import MemoryStore, ToldStore, file_store, get, image, name, put, room

from rootcellar.tiers import guard as guard_module
from rootcellar.tiers import sealing
from rootcellar.tiers.faulty import Faults, FaultyStore
from rootcellar.tiers.guard import BreakerStats, Guard, GuardSettings
from rootcellar.tiers.store import GatheringStore


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def test_an_exception_is_a_miss_that_is_logged_once(caplog, clock):
    store = ToldStore(MemoryStore())
    guard = Guard(store, GuardSettings(failures=10), now=clock)
    assert put(guard, [1]) == [True]
    store.error = OSError("the cable is out")
    with caplog.at_level(logging.INFO, "rootcellar.tiers"):
        assert guard.has([name(1)]) == [False]
        assert not get(guard, 1)
        assert put(guard, [2]) == [False]
    (line,) = caplog.messages
    assert "the cable is out" in line
    store.error = None
    with caplog.at_level(logging.INFO, "rootcellar.tiers"):
        assert get(guard, 1)
        store.error = OSError("again")
        assert not get(guard, 1)
    assert [("works again, after 3" in m, "again')" in m) for m in caplog.messages[1:]] == [
        (True, False),
        (False, True),
    ]
    stats = guard.stats()
    assert (stats["get"].hits, stats["get"].misses, stats["get"].failures) == (1, 2, 2)
    assert (stats["put"].hits, stats["put"].failures, stats["has"].failures) == (1, 1, 1)


def test_a_store_that_fails_is_left_alone_and_tried_later(clock):
    store = ToldStore(MemoryStore())
    guard = Guard(store, GuardSettings(failures=3, pause=1, longest_pause=3), now=clock)
    put(guard, [1])
    store.error = OSError("no")
    for _ in range(10):
        assert not get(guard, 1)
    assert store.calls == 1 + 3
    assert guard.stats()["get"].skipped == 7
    pauses = []
    for _ in range(4):  # one try at a time, after longer and longer pauses
        before, calls = clock.seconds, store.calls
        while store.calls == calls:
            clock.seconds += 0.5
            assert not get(guard, 1)
        pauses.append(clock.seconds - before)
    assert pauses == [1, 2, 3, 3]
    store.error = None
    assert not get(guard, 1)
    clock.seconds += 3
    assert get(guard, 1)
    store.error = OSError("no")
    assert [get(guard, 1) for _ in range(5)] == [False] * 5
    clock.seconds += 1  # the pause begins anew
    store.error = None
    assert get(guard, 1)


def test_only_one_call_tries(clock):
    """While it is under way others are skipped."""
    store = ToldStore(MemoryStore())
    guard = Guard(store, GuardSettings(failures=1, pause=1), now=clock)
    put(guard, [1])
    store.error = OSError("no")
    get(guard, 1)
    clock.seconds += 1
    store.error, store.gate = None, threading.Event()
    found = []
    probe = threading.Thread(target=lambda: found.append(get(guard, 1)))
    probe.start()
    store.entered.wait()
    calls = store.calls
    assert not get(guard, 1)
    assert store.calls == calls
    store.gate.set()
    probe.join()
    assert found == [True]
    assert get(guard, 1)


def test_a_call_that_hangs_is_left_behind_and_touches_nobodys_memory():
    inner = MemoryStore()
    store = ToldStore(inner)
    guard = Guard(store, GuardSettings(deadline=0.02, failures=100, most_hanging=2))
    inner.put([name(2)], [image(2)])
    put(guard, [1])
    store.gate = threading.Event()
    into = room()
    assert guard.get([name(1)], [into]) == [False]
    assert bytes(into) == b"\xaa" * 5000
    block = bytearray(image(3))
    assert guard.put([name(3)], [memoryview(block)]) == [False]
    block[:] = bytes(5000)  # the caller's again
    calls = store.calls
    assert not get(guard, 1)  # two hang: it is not asked
    assert store.calls == calls
    gate, store.gate = store.gate, None
    gate.set()
    store.idle.wait()
    assert bytes(into) == b"\xaa" * 5000
    while not get(guard, 1):  # as soon as the threads are over
        pass
    assert get(guard, 3)  # it was put after all, and right
    stats = guard.stats()
    assert stats["get"].failures + stats["put"].failures == 2


def test_a_slow_store_that_verifies_is_stopped_between_its_pages(tmp_path, clock):
    """It works in the caller's memory, so it is never left behind; what had come by then is used."""
    store = ToldStore(file_store(tmp_path / "store"))
    guard = Guard(store, GuardSettings(deadline=5, pages_at_once=4), now=clock)
    put(guard, range(20))
    store.work = lambda: setattr(clock, "seconds", clock.seconds + 2)
    found = guard.get([name(i) for i in range(20)], [room() for _ in range(20)])
    assert found == [True] * 12 + [False] * 8
    stats = guard.stats()["get"]
    assert (stats.hits, stats.misses, stats.skipped, stats.failures, stats.seconds) == (12, 0, 8, 1, 6)
    assert stats.bytes == 12 * 5000


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held[:-1] + bytes([held[-1] ^ 1]),
        lambda held: bytes([held[0] ^ 1]) + held[1:],
        lambda held: held[:-1],
        lambda held: held + b"\0",
        lambda held: bytes(len(held)),
        lambda held: b"",
    ],
    ids=["a bit of the seal", "a bit of the image", "shorter", "longer", "zeros", "nothing"],
)
def test_what_comes_back_otherwise_is_a_miss(change):
    inner = MemoryStore()
    guard = Guard(inner)
    put(guard, [1, 2])
    inner.objects[name(1)] = change(inner.objects[name(1)])
    assert not get(guard, 1)
    assert get(guard, 2)


def test_another_pages_object_is_a_miss():
    inner = MemoryStore()
    guard = Guard(inner)
    put(guard, [1, 2])
    inner.objects[name(1)] = inner.objects[name(2)]
    assert not get(guard, 1)
    assert guard.stats()["get"].damaged == 1


def test_an_answer_of_another_length_is_a_failure():
    store = ToldStore(MemoryStore())
    guard = Guard(store)
    put(guard, [1])
    store.answer = []
    assert not get(guard, 1)
    assert guard.has([name(1)]) == [False]
    assert guard.stats()["get"].failures == 1


def test_nothing_is_checked_twice(tmp_path):
    """The file store verifies, so its pages are as large in it as without a guard."""
    store = file_store(tmp_path / "store")
    put(Guard(store), [1])
    assert get(store, 1)


def test_closing_a_store_that_fails_or_hangs():
    store = ToldStore(MemoryStore())
    store.error = OSError("no")
    Guard(store).close()
    store.error, store.gate = None, threading.Event()
    Guard(store, GuardSettings(deadline=0.02)).close()
    store.gate.set()


@pytest.mark.parametrize("seed", range(3))
def test_an_unreliable_store_never_gives_other_bytes(seed):
    faults = Faults(delay=0.05, fail=0.05, short=0.1, flip=0.1, lie=0.3, late=0.0001)
    store = FaultyStore(MemoryStore(), faults, seed)
    guard = Guard(store, GuardSettings(failures=10**6))
    rng, found = np.random.default_rng(seed), 0
    for _ in range(80):
        some = rng.permutation(20)[: int(rng.integers(1, 8))].tolist()
        put(guard, some)
        held = guard.has([name(i) for i in some])
        got = [get(guard, i) for i in rng.permutation(20)[:3].tolist()]
        into = [room() for _ in some]
        whole = guard.get([name(i) for i in some], into)
        assert all(view == image(i) for i, view, there in zip(some, into, whole, strict=True) if there)
        found += sum(whole) + sum(got)
        assert len(held) == len(some)
    assert found > 80
    assert guard.stats()["get"].damaged > 0
    assert min(store.seen.values()) > 0, store.seen


def test_what_a_hanging_call_works_on_is_not_used_again_before_it_ends():
    """Else its page would be written with the bytes of the next one."""
    store = ToldStore(MemoryStore())
    guard = Guard(store, GuardSettings(deadline=0.05, failures=100))
    store.gate = threading.Event()
    assert put(guard, [1]) == [False]
    gate, store.gate = store.gate, None
    assert put(guard, [2]) == [True]
    gate.set()
    store.idle.wait()
    assert get(guard, 1)
    assert get(guard, 2)
    assert guard.stats()["get"].damaged == 0


def test_a_store_is_shown_the_memory_that_it_is_given_once():
    inner, shown, given = MemoryStore(), [], []
    store = ToldStore(inner)
    inner.register = shown.append
    inner.put = lambda names, blocks: given.extend(blocks) or [True] * len(names)
    guard = Guard(store)
    for i in range(5):
        assert put(guard, [i, i + 1]) == [True, True]
    (memory,) = shown
    start = np.frombuffer(memory, np.uint8).ctypes.data
    for block in given:
        at = np.frombuffer(block, np.uint8).ctypes.data
        assert start <= at <= at + len(block) <= start + len(memory)


def test_calls_run_on_threads_that_are_kept_until_it_is_closed():
    """Also one that was left behind; as many as are at work at once."""
    inner, threads = MemoryStore(), []
    store = ToldStore(inner)
    store.work = lambda: threads.append(threading.current_thread())
    guard = Guard(store, GuardSettings(deadline=0.05, failures=10))
    assert all(put(guard, [i])[0] and get(guard, i) for i in range(5))
    assert len(set(threads)) == 1
    store.gate = threading.Event()
    assert put(guard, [5]) == [False]
    gate, store.gate = store.gate, None
    assert all(put(guard, [i])[0] for i in range(5))
    assert len(set(threads)) == 2
    gate.set()
    while guard._hanging:
        time.sleep(0.001)
    assert all(put(guard, [i])[0] for i in range(5))
    assert len(set(threads)) == 2
    guard.close()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("lengths", "unit"), [([100_000, 33, 64, 65_536 + 32], 4096), ([1, 65, 40_000, 7], 64)])
def test_objects_begin_at_a_line_and_where_some_are_long_at_a_page(lengths, unit):
    memory = sealing.Scratch(sealing.room(lengths))
    views = memory.split(lengths)
    starts = [np.frombuffer(view, np.uint8).ctypes.data for view in views]
    assert [start % unit for start in starts] == [0] * 4
    assert [len(view) for view in views] == lengths
    assert all(start + n <= after for start, n, after in zip(starts, lengths, starts[1:], strict=False))
    assert starts[-1] + lengths[-1] <= starts[0] + sealing.room(lengths)


def test_a_store_that_keeps_what_it_was_shown_is_shown_little():
    """However the sizes of its calls grow, and however many of them hang again and again."""
    inner, shown = MemoryStore(), []
    store = ToldStore(inner)
    inner.register = lambda memory: shown.append(len(memory))
    guard = Guard(store)
    for mib in range(1, 9):
        assert put(guard, [mib], mib * 1_000_000) == [True]
    assert shown == [1 << 20, 2 << 20, 4 << 20, 8 << 20]
    shown.clear()
    guard = Guard(store, GuardSettings(deadline=0.05, failures=10**6))
    for _ in range(3):
        store.gate = threading.Event()
        assert [put(guard, [i]) for i in range(4)] == [[False]] * 4
        gate, store.gate = store.gate, None
        gate.set()
        while guard._hanging:
            time.sleep(0.001)
    assert shown == [1 << 20] * 4


def test_large_pages_are_given_a_few_at_a_time():
    inner, counts = MemoryStore(), []
    guard = Guard(ToldStore(inner), GuardSettings(bytes_apart=12_000, pages_apart=3))
    inner.put = lambda names, _: counts.append(len(names)) or [True] * len(names)
    assert put(guard, range(5)) == [True] * 5
    assert put(guard, [1, 2], 20_000) == [True] * 2
    assert put(guard, range(10), 10) == [True] * 10
    assert counts == [2, 2, 1, 1, 1, 3, 3, 3, 1]


@pytest.mark.parametrize("pages", [4, 20], ids=["one piece", "several"])
def test_a_store_that_is_always_late_is_left_alone(tmp_path, clock, pages):
    """Though it does all that it is asked; what came is used, and it is tried again after a while."""
    store = ToldStore(file_store(tmp_path / "store"))
    guard = Guard(store, GuardSettings(deadline=5, pages_at_once=4, failures=3, pause=10), now=clock)
    names, into = [name(i) for i in range(pages)], [room() for _ in range(pages)]
    put(guard, range(pages))
    late = True
    store.work = lambda: setattr(clock, "seconds", clock.seconds + 6 * late)
    for _ in range(3):
        assert guard.get(names, into) == [i < 4 for i in range(pages)]
    calls = store.calls
    assert guard.get(names, into) == guard.put(names, into) == guard.has(names) == [False] * pages
    assert store.calls == calls
    assert guard.breaker() == BreakerStats(left_alone=1, used_again=0, away=True)
    clock.seconds += 10
    assert sum(guard.get(names, into)) == 4  # late again: for twice as long
    clock.seconds += 10
    assert not any(guard.get(names, into))
    late = False
    clock.seconds += 10
    assert guard.get(names, into) == [True] * pages
    assert guard.breaker() == BreakerStats(left_alone=1, used_again=1, away=False)


def test_a_call_ends_at_the_moment_that_was_said(tmp_path, clock):
    """Which may be before its deadline."""
    store = ToldStore(file_store(tmp_path / "store"))
    guard = Guard(store, GuardSettings(deadline=60, pages_at_once=1), now=clock)
    put(guard, range(4))
    store.work = lambda: setattr(clock, "seconds", clock.seconds + 1)
    into = [room() for _ in range(4)]
    assert guard.get([name(i) for i in range(4)], into, clock.seconds + 2.5) == [True] * 3 + [False]
    assert guard.has([name(i) for i in range(4)]) == [True] * 4


def test_what_others_left_of_the_time_is_not_held_against_a_store(clock):
    """Unless it was half of its deadline or more; a try that had too little time says nothing either way."""
    store = ToldStore(MemoryStore())
    guard = Guard(store, GuardSettings(deadline=0.4, failures=3, pause=10, most_hanging=100), now=clock)
    put(guard, [1])
    gate = threading.Event()

    def has(left):
        return guard.has([name(1)], clock.seconds + left)

    store.gate = gate
    for _ in range(5):
        assert has(0.01) == [False]
    assert guard.stats()["has"].failures == 0
    assert not guard.breaker().away
    for _ in range(3):
        assert has(0.25) == [False]
    assert guard.breaker() == BreakerStats(left_alone=1, used_again=0, away=True)
    clock.seconds += 10
    calls = store.calls
    assert has(0.01) == has(0.01) == [False]
    assert store.calls == calls + 1
    gate.set()
    store.idle.wait(60)
    assert guard.stats()["has"].failures == 3
    clock.seconds += 20
    assert has(0.4) == [True]
    assert guard.breaker() == BreakerStats(left_alone=1, used_again=1, away=False)


def test_a_store_that_is_late_by_its_own_deadline_failed_whatever_it_was_given(tmp_path, clock):
    store = ToldStore(file_store(tmp_path / "store"))
    guard = Guard(store, GuardSettings(deadline=5), now=clock)
    for passes, failures in ((2, 0), (6, 1)):
        store.work = lambda passes=passes: setattr(clock, "seconds", clock.seconds + passes)
        guard.has([name(1)], clock.seconds + 1)
        assert guard.stats()["has"].failures == failures


class Gatherer(MemoryStore, GatheringStore):
    """Sends images from where they lie, once they were registered."""

    def __init__(self):
        super().__init__()
        self.shown, self.sent = [], []

    def register(self, buffer):
        self.shown.append(buffer)

    def gathers(self, images):
        return all(len(view) > 1000 for view in images) and len(self.shown) > 0

    def put_parts(self, names, images, tail):
        self.sent += [np.frombuffer(view, np.uint8).ctypes.data for view in images]
        return self.put(names, [memoryview(bytes(view) + bytes(tail(i))) for i, view in enumerate(images)])


def test_what_comes_while_it_is_checked_is_a_miss(monkeypatch):
    """It is what was copied that is checked, whatever the store still writes when it has answered."""
    inner, came = MemoryStore(), []
    guard = Guard(inner)
    put(guard, [1])
    whole, real = bytes(inner.objects[name(1)]), xxhash.xxh3_64

    def early(_, into):
        came.append(into[0])
        into[0][:] = bytes(5000) + whole[5000:]
        return [True]

    class Late:
        def __init__(self, seed):
            self._checksum = real(seed=seed)
            self.intdigest = self._checksum.intdigest

        def update(self, piece):
            came[0][:] = whole
            self._checksum.update(piece)

    monkeypatch.setattr(inner, "get", early)
    monkeypatch.setattr(sealing, "NATIVE", False)
    monkeypatch.setattr(xxhash, "xxh3_64", Late)
    into = room()
    assert guard.get([name(1)], [into]) == [False]
    assert guard.stats()["get"].damaged == 1


def test_images_are_sent_from_where_they_lie(monkeypatch):
    monkeypatch.setattr(guard_module, "_SUMMED", 10_000)  # two at a time
    store = Gatherer()
    guard = Guard(store)
    pool = np.zeros((4, 5000), np.uint8)
    guard.register(pool.reshape(-1).data)
    for i in range(4):
        pool[i] = np.frombuffer(image(i), np.uint8)
    assert guard.put([name(i) for i in range(4)], [row.data for row in pool]) == [True] * 4
    assert store.sent == [row.ctypes.data for row in pool]
    assert put(guard, [9], 700) == [True]  # a small one is copied
    assert len(store.sent) == 4
    assert all(get(guard, i) for i in range(4))
    assert get(guard, 9, 700)


@pytest.mark.parametrize("make", [Gatherer, MemoryStore])
def test_what_cannot_be_summed_up_is_not_stored(monkeypatch, make):
    """The call is waited for, and then its memory is free again."""
    store = make()
    guard = Guard(store, GuardSettings(failures=10))
    page = np.frombuffer(image(1), np.uint8).copy()
    guard.register(page.data)

    def fails(*_):
        raise MemoryError("too little")

    with monkeypatch.context() as patch:
        patch.setattr(guard_module, "seals_of", fails)
        assert guard.put([name(1)], [page.data]) == [False]
    assert guard.has([name(1)]) == [False]
    assert (guard.stats()["put"].failures, guard._hanging, len(guard._spare)) == (1, 0, 1)
    assert guard.put([name(1)], [page.data]) == [True]
    assert get(guard, 1)


@pytest.mark.parametrize("changed", [2500, 5000])
def test_what_is_changed_while_a_call_that_was_left_behind_sends_it_is_a_miss(monkeypatch, changed):
    """Its memory is the caller's again when the deadline is over, even if it holds another page then."""
    store, gate, over = Gatherer(), threading.Event(), threading.Event()
    guard = Guard(store, GuardSettings(deadline=0.05))
    page = np.frombuffer(image(1), np.uint8).copy()
    guard.register(page.data)
    kept = store.put_parts

    def late(*parts):
        assert gate.wait(60)
        held = kept(*parts)
        over.set()
        return held

    monkeypatch.setattr(store, "put_parts", late)
    assert guard.put([name(1)], [page.data]) == [False]
    page[:changed] = np.frombuffer(image(2), np.uint8)[:changed]
    gate.set()
    assert over.wait(60)
    assert guard.has([name(1)]) == [True]
    assert not get(guard, 1)
    assert guard.stats()["get"].damaged == 1
