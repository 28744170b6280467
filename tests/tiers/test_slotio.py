"""Images between memory and slots of a file: in C++ and in Python the same, several at a time."""

import os
import threading

import pytest
from stores import image, room
from transfers import VECTORS, compare, compare_sums

from rootcellar.tiers.stores import slotio


@pytest.mark.skipif(not slotio.NATIVE, reason="the file store's transfers were not built")
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("vectors", VECTORS)
def test_native_transfers_do_what_those_of_python_do(tmp_path, direct, vectors):
    compare(tmp_path, direct, vectors)


@pytest.mark.skipif(not slotio.NATIVE, reason="the file store's transfers were not built")
@pytest.mark.parametrize("vectors", VECTORS)
def test_native_checksums_are_those_of_xxhash_of_what_was_copied(vectors):
    compare_sums(vectors)
    for images, seeds, into in ([room(240)], [1], []), ([room()], [1, 2], []), ([room()], [1], [room(300)]):
        with pytest.raises(ValueError, match="no such image"):
            slotio._slots.sums(images, seeds, into, vectors)


@pytest.mark.skipif(not slotio.NATIVE, reason="the file store's transfers were not built")
@pytest.mark.parametrize("direct", [False, True])
def test_native_transfers_that_fail_are_errors(tmp_path, direct):
    fast = slotio.medium(direct)
    run = slotio.Run(0, [room()], [1], [0])
    for flags, call in ((os.O_RDONLY, fast.write), (os.O_WRONLY, fast.read)):
        fd = os.open(tmp_path / "slots", flags | os.O_CREAT, 0o600)
        with pytest.raises(OSError, match="Bad file descriptor"):
            call(fd, 0, 8192, run)
        os.close(fd)


@pytest.mark.skipif(not slotio.NATIVE, reason="the file store's transfers were not built")
@pytest.mark.parametrize("piece", [0, 1000])
def test_pieces_that_would_never_end_or_not_be_whole_blocks_are_refused(piece):
    with pytest.raises(ValueError, match="no such piece"):
        slotio._slots.read(0, 0, 8192, [room()], [1], piece)
    with pytest.raises(ValueError, match="no such piece"):
        slotio._slots.write(0, 0, 8192, [room()], [1], piece, True)


def test_a_medium_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    fd = os.open(tmp_path / "slots", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="Input/output error"):
        slotio.BufferedByPython().write(fd, 0, 8192, slotio.Run(0, [room()], [1], [0]))
    os.close(fd)


def test_a_crew_does_each_job_once_and_waits_for_its_own_only():
    crew = slotio.Crew(2, "crew")
    inside, go_on = threading.Event(), threading.Event()

    def hang(job):
        inside.set()
        assert go_on.wait(30)

    held = threading.Thread(target=crew.each, args=(hang, [0, 1, 2]))
    held.start()
    assert inside.wait(30)
    done = []
    crew.each(done.append, range(50))  # while its threads are with the others
    assert sorted(done) == list(range(50))
    go_on.set()
    held.join(30)
    crew.each(done.append, range(50, 60))
    assert sorted(done) == list(range(60))
    crew.close()


def test_a_crew_tells_what_went_wrong_when_all_is_over():
    crew, done = slotio.Crew(1, "crew"), []
    both = threading.Barrier(2)

    def do(job):
        if job < 2:
            both.wait(30)  # one is the helper's
            raise MemoryError(job)
        done.append(job)

    for _ in range(2):
        with pytest.raises(MemoryError):
            crew.each(do, range(20))
    assert sorted(done) == sorted([*range(2, 20)] * 2)
    crew.close()


def test_whoever_comes_to_a_crew_that_was_closed_works_alone():
    crew, names = slotio.Crew(2, "crew"), set()
    crew.each(lambda _: None, range(9))
    threads = list(crew._threads)
    crew.close()
    for thread in threads:
        thread.join(30)
    crew.each(lambda _: names.add(threading.current_thread()), range(9))
    assert names == {threading.current_thread()}
    assert not crew._threads


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sizes", [(3000, 200, 300), (200, 3000, 300), (300, 4096, 200)])
def test_images_of_which_some_are_small(tmp_path, direct, sizes):
    how = slotio.medium(direct)
    given = [image(i, size) for i, size in enumerate(sizes)]
    run = slotio.Run(0, given, [1, 2, 3], range(3))
    fd = os.open(tmp_path / "slots", os.O_RDWR | os.O_CREAT | how.flags)
    sums = how.write(fd, 0, 4096, run)
    into = [memoryview(bytearray(size)) for size in sizes]
    assert how.read(fd, 0, 4096, slotio.Run(0, into, [1, 2, 3], range(3))) == sums
    assert into == given
    os.close(fd)
