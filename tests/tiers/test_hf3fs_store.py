"""Slots of a file on a shared mount: what is reserved, who may read, and what makes room."""

import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from stores import get, name, put

from rootcellar.errors import ConfigError
from rootcellar.tiers.stores import hf3fs
from rootcellar.tiers.stores.hf3fs import Hf3fsSettings, Hf3fsStore


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def opened(path, clock, **settings):
    return Hf3fsStore(Hf3fsSettings(path / "pages", **{"file_size": 4 * 8192, **settings}), clock)


def test_what_was_not_used_for_longest_makes_room(tmp_path, clock):
    store = opened(tmp_path, clock)
    for i in range(4):
        clock.seconds += 1
        assert put(store, [i]) == [True]
    clock.seconds += 1
    assert get(store, 0)
    assert put(store, [4]) == [True]
    assert store.has([name(i) for i in range(5)]) == [True, False, True, True, True]
    assert all(get(store, i) for i in (0, 2, 3, 4))
    assert put(store, [5, 6, 7, 8, 9]) == [True] * 4 + [False]  # within a call nothing makes room by what it brought
    store.close()


def test_a_page_that_another_thread_writes_is_waited_for(tmp_path, clock, monkeypatch):
    store = opened(tmp_path, clock)
    began, asks, go_on = threading.Event(), threading.Event(), threading.Event()
    write, kept = store._write, store._kept

    def slowly(place, view):
        began.set()
        assert go_on.wait(20)
        return write(place, view)

    def noted(names):
        asks.set()
        return kept(names)

    monkeypatch.setattr(store, "_write", slowly)
    monkeypatch.setattr(store, "_kept", noted)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(put, store, [1])
        assert began.wait(20)
        second = threads.submit(put, store, [1])
        assert asks.wait(20), "the second finds that the page is under way"
        go_on.set()
        assert (first.result(20), second.result(20)) == ([True], [True])
    assert get(store, 1)
    store.close()


def test_a_page_that_is_too_large_for_the_file_is_not_kept(tmp_path, clock):
    store = opened(tmp_path, clock)
    assert put(store, [1], 5 * 8192) == [False]
    assert not get(store, 1, 5 * 8192)
    store.close()


def test_nobody_reads_what_is_not_written_and_a_dead_writers_slot_is_taken_back(tmp_path, clock, monkeypatch):
    store, other = opened(tmp_path, clock), opened(tmp_path, clock)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", lambda *_: (_ for _ in ()).throw(OSError("the mount is gone")))
        with pytest.raises(OSError, match="the mount is gone"):
            put(store, [1])
    assert other.has([name(1)]) == [False]
    assert put(other, [1]) == [False]  # as far as it knows, it is being written
    clock.seconds += 61
    assert put(other, [1]) == [True]
    assert get(store, 1)
    store.close()
    other.close()


def test_shards_write_into_files_of_their_own_and_read_all(tmp_path, clock):
    first, second = opened(tmp_path, clock, shard=0), opened(tmp_path, clock, shard=1)
    assert put(first, [1]) == put(second, [2]) == [True]
    assert get(first, 2)
    assert get(second, 1)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["pages.0.8192.bin", "pages.1.8192.bin"]
    first.close()
    second.close()


def test_whoever_shares_an_index_has_files_of_one_size(tmp_path, clock):
    """Else the same number of a slot would be another place."""
    store = opened(tmp_path, clock)
    assert put(store, [1]) == [True]
    with pytest.raises(ConfigError, match=r"file_size=65536 is not allowed: those who share the index .* have 32768"):
        opened(tmp_path, clock, file_size=8 * 8192, shard=1)
    other = opened(tmp_path, clock, shard=1)
    assert get(other, 1)
    store.close()
    other.close()


def test_an_index_that_could_not_be_changed_can_be_later(tmp_path, clock, monkeypatch):
    """Somebody who stopped in the middle of reading it keeps a change from being done; nothing of that stays behind."""
    monkeypatch.setattr(hf3fs, "_PATIENCE", 0.05)
    store = opened(tmp_path, clock)
    assert put(store, [1, 2]) == [True, True]
    with closing(sqlite3.connect(tmp_path / "pages.index")) as reader:
        stopped = reader.execute("SELECT name FROM pages")
        assert stopped.fetchone()
        with pytest.raises(OSError, match="the index of the hf3fs store failed: database is locked"):
            put(store, [3])
        stopped.close()
    assert put(store, [3]) == [True]
    assert get(store, 3)
    store.close()


def test_a_writer_that_was_given_up_confirms_nothing_of_who_came_after_it(tmp_path, clock, monkeypatch):
    store, other = opened(tmp_path, clock), opened(tmp_path, clock, shard=1)
    write, seen = Hf3fsStore._write, []

    def slow(self, place, view):
        if self is store:  # for longer than it is waited for; the other one has begun by then
            clock.seconds += 61
            with other._asking(), other._changing():
                assert other._reserve(name(1), 5000) is not None
            seen.append(place)
        return write(self, place, view)

    monkeypatch.setattr(Hf3fsStore, "_write", slow)
    assert put(store, [1]) == [False]
    assert seen
    assert other.has([name(1)]) == [False]
    store.close()
    other.close()


def test_an_index_that_is_none_is_closed_again(tmp_path, clock):
    (tmp_path / "pages.index").write_bytes(b"no index at all" * 1000)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="cannot be used: file is not a database") as raised:
        opened(tmp_path, clock)
    assert raised.value.__traceback__ is not None  # which would keep what was not closed
    assert len(os.listdir("/proc/self/fd")) == before
