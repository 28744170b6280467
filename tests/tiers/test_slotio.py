"""Images between memory and slots of a file: in C++ and in Python the same, several at a time."""

import os
import threading

import pytest
from stores import image, name, room

from rootcellar.tiers.stores import segment, slotio


@pytest.mark.skipif(not slotio.NATIVE, reason="the file store's transfers were not built")
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("vectors", ["", "plain"])
def test_native_transfers_do_what_those_of_python_do(tmp_path, direct, vectors):
    """Images of lengths around those of stripes, blocks and pieces, of which one reads what the other wrote."""
    slow = slotio.UnbufferedByPython() if direct else slotio.BufferedByPython()
    fast = slotio.Native(slow, direct, vectors)
    fd = os.open(tmp_path / "slots", os.O_RDWR | os.O_CREAT | slow.flags)
    around = [n + d for n in (1024, 4096, 12_288, slotio.READ_PIECE, slotio.WRITE_PIECE) for d in (-65, -64, -1, 0, 1)]
    for turn, size in enumerate([240, 241, 255, *around]):
        count = 1 + turn % 3
        stride = slotio.round_up(size)
        given = [memoryview(bytes(image(turn + i, size + turn % 40)))[turn % 40 :] for i in range(count)]
        seeds = [segment.seed_of(name(turn + i), size) for i in range(count)]
        for writes, reads in ((fast, slow), (slow, fast)):
            os.ftruncate(fd, 0)
            into = [memoryview(bytearray(size + turn % 33))[turn % 33 :] for _ in given]
            sums = writes.write(fd, 8192, stride, slotio.Run(0, given, seeds, range(count)))
            assert os.fstat(fd).st_size == 8192 + count * stride
            run = slotio.Run(0, into, seeds, range(count))
            assert (reads.read(fd, 8192, stride, run), into) == (sums, given)
            os.ftruncate(fd, 8192 + (count - 1) * stride)
            assert [*reads.read(fd, 8192, stride, run)] == [*sums[:-1], None]
    os.close(fd)


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
