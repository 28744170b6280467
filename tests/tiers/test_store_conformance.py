"""What every store has to keep to."""

import threading

import numpy as np
import pytest
from stores import MemoryStore, ToldStore, file_store, get, image, name, put, room

from rootcellar.tiers.guard import Guard

STORES = {
    "memory": lambda _: MemoryStore(),
    "file": file_store,
    "file-direct": lambda path: file_store(path, direct=True),
    "file-fsync": lambda path: file_store(path, fsync=True),
    "guarded memory": lambda _: Guard(ToldStore(MemoryStore())),
    "guarded file": lambda path: Guard(ToldStore(file_store(path))),
}


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    made = STORES[request.param](tmp_path / "store")
    yield made
    made.close()


def test_what_was_put_is_there_and_what_was_not_is_missing(store):
    assert store.has([name(1)]) == [False]
    assert not get(store, 1)
    assert put(store, [1, 2, 3]) == [True] * 3
    assert store.has([name(i) for i in (3, 4, 1)]) == [True, False, True]
    into = [room() for _ in range(4)]
    assert store.get([name(i) for i in (3, 4, 1, 2)], into) == [True, False, True, True]
    assert [bytes(view) for view in (into[0], into[2], into[3])] == [bytes(image(i)) for i in (3, 1, 2)]


def test_after_a_clearing_nothing_is_there_and_all_can_be_put_again(store):
    put(store, [1, 2])
    put(store, [3], 700)
    assert store.clear() == 3
    assert store.has([name(i) for i in (1, 2, 3)]) == [False] * 3
    assert not get(store, 1)
    assert store.clear() == 0
    assert put(store, [1, 2]) == [True, True]
    assert get(store, 2)


def test_nothing_of_nothing(store):
    assert (store.has([]), store.get([], []), store.put([], [])) == ([], [], [])


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 36 << 10, (1 << 20) + 512])
def test_images_of_any_size_beside_each_other(store, nbytes):
    assert put(store, [1, 2], nbytes) == [True, True]
    assert put(store, [3], 700) == [True]
    assert get(store, 1, nbytes)
    assert get(store, 2, nbytes)
    assert get(store, 3, 700)


@pytest.mark.parametrize("nbytes", [4999, 5001, 4096, 9000])
def test_another_length_is_a_miss(store, nbytes):
    put(store, [1])
    assert store.get([name(1)], [room(nbytes)]) == [False]
    assert get(store, 1)


def test_a_page_is_put_once_whatever_comes_again(store):
    assert put(store, [1, 1]) == [True, True]
    assert put(store, [1, 2]) == [True, True]
    assert store.has([name(1), name(1)]) == [True, True]
    assert store.get([name(1), name(1)], [room(), room()]) == [True, True]
    assert get(store, 2)


def test_thousands_of_tiny_pages_in_one_call(store):
    pages = range(3000)
    assert put(store, pages, 10) == [True] * 3000
    into = [room(10) for _ in pages]
    assert store.get([name(i) for i in pages], into) == [True] * 3000
    assert all(into[i] == image(i, 10) for i in (0, 255, 256, 1023, 1024, 2999))


def test_memory_of_other_shapes(store):
    page = np.arange(600, dtype=np.float32).reshape(2, 3, 100)
    assert store.put([name(1)], [memoryview(page)]) == [True]
    into = np.zeros_like(page)
    assert store.get([name(1)], [memoryview(into).cast("B")]) == [True]
    assert (into == page).all()


def test_blocks_may_be_changed_after_the_call(store):
    block = bytearray(image(1))
    store.put([name(1)], [memoryview(block)])
    block[:] = bytes(len(block))
    assert get(store, 1)


def test_what_no_store_takes(store):
    for call in (
        lambda: store.has([b"short"]),
        lambda: store.get([b"short"], [room()]),
        lambda: store.put([name(1)], []),
        lambda: store.put([name(1)], [memoryview(b"")]),
    ):
        with pytest.raises(ValueError, match=r"bytes|blocks"):
            call()


def test_closing_twice(store):
    put(store, [1])
    store.close()
    store.close()


def test_threads_get_what_others_put(store):
    """Four threads put pages that overlap and read all of them; whoever was told that a page is there finds it."""
    wrong = []

    def work(first):
        for i in range(first, first + 40):
            if put(store, [i, i + 1]) != [True, True] or not get(store, i) or not get(store, i + 1):
                wrong.append(i)
            get(store, (i * 7) % 60)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 5, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.has([name(i) for i in range(61)]) == [True] * 61
