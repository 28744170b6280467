"""The tests. Each has a fixture ``subject`` (``subject.Subject``), from the plugin or from whoever imports them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from rootcellar.tiers.conformance.pages import get, image, name, put, room
from rootcellar.tiers.conformance.subject import Subject
from rootcellar.tiers.guard import Guard, GuardSettings
from rootcellar.tiers.store import Store

DEADLINE = 1.0
"""Seconds that the guard gives a server."""
_IMPATIENT = GuardSettings(deadline=DEADLINE, failures=3, pause=0.05, longest_pause=0.2, most_hanging=8)


@pytest.fixture
def store(subject: Subject) -> Iterator[Store]:
    """The store by itself."""
    opened = subject.open()
    yield opened
    opened.close()


@pytest.fixture
def guarded(subject: Subject) -> Iterator[Store]:
    """The store as an engine uses it."""
    opened = Guard(subject.open())
    yield opened
    opened.close()


def test_what_was_put_is_there_and_what_was_not_is_missing(store: Store) -> None:
    """By each of the calls."""
    assert store.has([name(1)]) == [False]
    assert not get(store, 1)
    assert put(store, [1, 2, 3]) == [True] * 3
    assert store.has([name(i) for i in (3, 4, 1)]) == [True, False, True]
    into = [room() for _ in range(4)]
    assert store.get([name(i) for i in (3, 4, 1, 2)], into) == [True, False, True, True]
    assert [bytes(view) for view in (into[0], into[2], into[3])] == [bytes(image(i)) for i in (3, 1, 2)]


def test_any_mix_of_present_and_missing(store: Store) -> None:
    """Batches of any length, in any order, of which any part is there, are answered page by page."""
    random = np.random.default_rng(1)
    there: set[int] = set()
    for _ in range(25):
        pages = [int(i) for i in random.choice(60, int(random.integers(1, 40)), replace=False)]
        if random.random() < 0.4:
            assert put(store, pages[:10]) == [True] * len(pages[:10])
            there.update(pages[:10])
        expected = [i in there for i in pages]
        into = [room() for _ in pages]
        assert store.has([name(i) for i in pages]) == expected
        assert store.get([name(i) for i in pages], into) == expected
        assert all(view == image(i) for i, view in zip(pages, into, strict=True) if i in there)


def test_after_a_clearing_nothing_is_there_and_all_can_be_put_again(subject: Subject, store: Store) -> None:
    """And it says how many there were."""
    if not subject.deletes:
        pytest.skip("its medium deletes nothing")
    put(store, [1, 2])
    put(store, [3], 700)
    assert store.clear() == 3
    assert store.has([name(i) for i in (1, 2, 3)]) == [False] * 3
    assert not get(store, 1)
    assert store.clear() == 0
    assert put(store, [1, 2]) == [True, True]
    assert get(store, 2)


def test_nothing_of_nothing(store: Store) -> None:
    """No pages, no answers."""
    assert (store.has([]), store.get([], []), store.put([], [])) == ([], [], [])


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 36 << 10, (1 << 20) + 512])
def test_images_of_any_size_beside_each_other(guarded: Store, nbytes: int) -> None:
    """From a byte up."""
    assert put(guarded, [1, 2], nbytes) == [True, True]
    assert put(guarded, [3], 700) == [True]
    assert get(guarded, 1, nbytes)
    assert get(guarded, 2, nbytes)
    assert get(guarded, 3, 700)


def test_an_image_of_64_mib(guarded: Store) -> None:
    """More than most media take in one piece."""
    assert put(guarded, [1], 64 << 20) == [True]
    assert get(guarded, 1, 64 << 20)


@pytest.mark.parametrize("nbytes", [4999, 5001, 4096, 9000])
def test_another_length_is_a_miss(guarded: Store, nbytes: int) -> None:
    """And what is there stays."""
    put(guarded, [1])
    assert guarded.get([name(1)], [room(nbytes)]) == [False]
    assert get(guarded, 1)


def test_a_page_is_put_once_whatever_comes_again(store: Store) -> None:
    """In one call, in two, and beside others."""
    assert put(store, [1, 1]) == [True, True]
    assert put(store, [1, 2]) == [True, True]
    assert store.has([name(1), name(1)]) == [True, True]
    assert store.get([name(1), name(1)], [room(), room()]) == [True, True]
    assert get(store, 2)


def test_hundreds_of_tiny_pages_in_one_call(store: Store) -> None:
    """More than any batch of a medium's own."""
    pages = range(700)
    assert put(store, pages, 10) == [True] * 700
    into = [room(10) for _ in pages]
    assert store.get([name(i) for i in pages], into) == [True] * 700
    assert all(into[i] == image(i, 10) for i in (0, 255, 256, 511, 512, 699))


def test_memory_of_other_shapes(guarded: Store) -> None:
    """Images are bytes, whatever they are written down as."""
    page = np.arange(600, dtype=np.float32).reshape(2, 3, 100)
    assert guarded.put([name(1)], [page.data]) == [True]
    into = np.zeros_like(page)
    assert guarded.get([name(1)], [into.data.cast("B")]) == [True]
    assert (into == page).all()


def test_blocks_may_be_changed_after_the_call(store: Store) -> None:
    """What was put is what they held then."""
    block = bytearray(image(1))
    store.put([name(1)], [memoryview(block)])
    block[:] = bytes(len(block))
    assert get(store, 1)


def test_memory_that_was_registered(store: Store) -> None:
    """Pages go out of it and come into it, and into other memory too."""
    pool = np.zeros((8, 8192), np.uint8)
    store.register(pool.reshape(-1).data)
    for i in range(4):
        pool[i] = np.frombuffer(image(i, 8192), np.uint8)
    assert store.put([name(i) for i in range(4)], [pool[i].data for i in range(4)]) == [True] * 4
    assert store.get([name(i) for i in range(4)], [pool[4 + i].data for i in range(4)]) == [True] * 4
    assert (pool[:4] == pool[4:]).all()
    assert get(store, 2, 8192)


@pytest.mark.parametrize("call", ["has", "get", "put", "empty"])
def test_what_no_store_takes(store: Store, call: str) -> None:
    """Names of another length, lists of different lengths, images of no bytes."""
    calls: dict[str, Callable[[], object]] = {
        "has": lambda: store.has([b"short"]),
        "get": lambda: store.get([b"short"], [room()]),
        "put": lambda: store.put([name(1)], []),
        "empty": lambda: store.put([name(1)], [memoryview(b"")]),
    }
    with pytest.raises(ValueError, match=r"bytes|blocks"):
        calls[call]()


def test_what_was_put_outlives_whoever_put_it(subject: Subject) -> None:
    """And a client may be closed twice."""
    first = subject.open()
    put(first, [1])
    first.close()
    first.close()
    second = subject.open()
    assert get(second, 1)
    second.close()


def test_threads_get_what_others_put(store: Store) -> None:
    """Four threads put pages that overlap and read all of them; whoever was told that a page is there finds it."""
    wrong = []

    def work(first: int) -> None:
        for i in range(first, first + 25):
            if put(store, [i, i + 1]) != [True, True] or not get(store, i) or not get(store, i + 1):
                wrong.append(i)
            get(store, (i * 7) % 45)

    _at_once([lambda first=first: work(first) for first in (0, 5, 10, 20)])  # type: ignore[misc]
    assert not wrong
    assert store.has([name(i) for i in range(46)]) == [True] * 46


def test_two_clients_at_once(subject: Subject, guarded: Store) -> None:
    """What one was told is kept, the other finds, while both are at work."""
    second = Guard(subject.open_second())
    kept: list[int] = []
    missed: list[int] = []
    done = threading.Event()

    def write() -> None:
        try:
            for i in range(60):
                kept.extend([i] if put(guarded, [i]) == [True] else [])
        finally:
            done.set()

    def read() -> None:
        seen = 0
        while not done.is_set() or seen < len(kept):
            if seen < len(kept):
                missed.extend([] if get(second, kept[seen]) else [kept[seen]])
                seen += 1
            else:
                time.sleep(0)
            get(second, 59)

    _at_once([write, read])
    assert len(kept) == 60
    assert not missed
    second.close()


def test_what_another_client_deletes_is_a_miss_and_can_be_put_again(subject: Subject, guarded: Store) -> None:
    """As evictions of a server do, behind everybody's back."""
    if not subject.deletes:
        pytest.skip("its medium deletes nothing")
    other = subject.open_second()
    put(guarded, [1, 2])
    assert guarded.has([name(1), name(2)]) == [True, True]
    other.clear()
    if any(other.has([name(1), name(2)])):
        other.close()
        pytest.skip("the second client only reads")
    assert not get(guarded, 1)
    assert guarded.has([name(1), name(2)]) == [False, False]
    assert put(guarded, [1]) == [True]
    assert get(guarded, 1)
    other.close()


@pytest.mark.parametrize("damage", ["another page", "cut short", "longer", "a bit flipped", "a bit of the end flipped"])
def test_what_is_not_the_page_is_a_miss(subject: Subject, store: Store, damage: str) -> None:
    """The objects lie under the page's name, as whoever damaged them would leave them; others are whole."""
    if store.verifies:
        pytest.skip("it keeps checksums of its own")
    if damage == "longer" and not subject.sees_ends:
        pytest.skip("it reads so many bytes, and never sees that there are more")
    seals = _Sealed()
    Guard(seals).put([name(i) for i in (1, 2, 3)], [image(i) for i in (1, 2, 3)])
    whole, other = seals.objects[name(1)], seals.objects[name(2)]
    flipped = bytearray(whole)
    flipped[len(flipped) // 2 if damage == "a bit flipped" else -1] ^= 8
    objects = {"another page": other, "cut short": whole[:-7], "longer": whole + b"0000"}
    store.put([name(1), name(3)], [memoryview(objects.get(damage, bytes(flipped))), memoryview(seals.objects[name(3)])])
    into = [room(), room()]
    assert Guard(store).get([name(1), name(3)], into) == [False, True]
    assert into[1] == image(3)


def test_other_bytes_under_a_name_are_never_mixed(store: Store) -> None:
    """Nobody puts them; whoever does gets the one or the other."""
    for i in range(4):
        store.put([name(1)], [image(10 + i)])
        into = room()
        assert store.get([name(1)], [into]) == [True]
        assert bytes(into) in [bytes(image(10 + k)) for k in range(4)]


def test_closing_while_calls_are_under_way(subject: Subject) -> None:
    """They end, with pages or with an error; none gives other bytes, and nothing crashes."""
    store = subject.open()
    begun = threading.Barrier(4)

    def work(first: int) -> None:
        begun.wait()
        try:
            for i in range(first, first + 200):
                put(store, [i])
                get(store, i)
        except (OSError, ValueError, RuntimeError):
            return

    threads = [threading.Thread(target=work, args=(1000 * k,), daemon=True) for k in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    store.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a call hangs after the store was closed"


# --- with a server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(subject: Subject) -> Iterator[tuple[Subject, Guard]]:
    """A store whose server can be killed, with a guard that does not wait for long."""
    if subject.server is None:
        pytest.skip("it has no server that could fail")
    store = Guard(subject.open(), _IMPATIENT)
    yield subject, store
    store.close()


def test_a_server_that_is_killed_is_missed_and_used_again_when_it_is_back(served: tuple[Subject, Guard]) -> None:
    """Calls end in time meanwhile, and nobody has to open anything again."""
    subject, store = served
    assert subject.server is not None
    assert put(store, [1]) == [True]
    subject.server.kill()
    try:
        for _ in range(4):
            began = time.monotonic()
            assert not get(store, 1)
            assert put(store, [2]) == [False]
            assert store.has([name(1)]) == [False]
            assert time.monotonic() - began < 3 * DEADLINE + 2
    finally:
        subject.server.start()
    comes_back(store)


def test_a_server_that_never_answers_is_given_up_at_the_deadline(served: tuple[Subject, Guard]) -> None:
    """It accepts connections and bytes, and says nothing; when it goes on, so does the store."""
    subject, store = served
    assert subject.server is not None
    assert put(store, [1]) == [True]
    with subject.server.stopped():
        began = time.monotonic()
        assert not get(store, 1)
        assert put(store, [2]) == [False]
        assert time.monotonic() - began < 2 * DEADLINE + 2
    comes_back(store)


def test_a_slow_server_gives_no_other_bytes(served: tuple[Subject, Guard]) -> None:
    """It stops and goes on in the middle of calls; they take longer, or miss."""
    subject, store = served
    assert subject.server is not None
    stop = threading.Event()

    def falter() -> None:
        assert subject.server is not None
        while not stop.is_set():
            with subject.server.stopped():
                stop.wait(0.03)
            stop.wait(0.02)

    faltering = threading.Thread(target=falter)
    faltering.start()
    try:
        for i in range(20):
            put(store, [i, i + 1], 60_000)
            get(store, i, 60_000)
    finally:
        stop.set()
        faltering.join()
    comes_back(store)


def comes_back(store: Guard, within: float = 30.0) -> None:
    """The guard finds out by itself that the store works: a page is put and read again before ``within`` seconds."""
    until = time.monotonic() + within
    page = 5000
    while put(store, [page]) != [True] or not get(store, page):
        assert time.monotonic() < until, "the store is not used again, though its server is there"
        page += 1
        time.sleep(0.05)


class _Sealed:
    """Keeps the objects that a guard makes of images."""

    verifies = False

    def __init__(self) -> None:
        self.objects: dict[bytes, bytes] = {}

    def has(self, names: Sequence[bytes]) -> list[bool]:
        return [each in self.objects for each in names]

    def get(self, _names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        return [False] * len(into)

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        self.objects |= {each: bytes(block) for each, block in zip(names, blocks, strict=True)}
        return [True] * len(names)

    def clear(self) -> int:
        return 0

    def register(self, buffer: memoryview) -> None:
        pass

    def close(self) -> None:
        pass


def _at_once(calls: list[Callable[[], None]]) -> None:
    """Run these on a thread each, and wait; what one raises is raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
