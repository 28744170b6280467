"""The file store: what outlives its process, what makes room, and what is no longer whole."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from stores import file_store, fill, get, image, name, put, room

from rootcellar.errors import ConfigError
from rootcellar.tiers.stores import segment, slotio
from rootcellar.tiers.stores.file import FileStore
from rootcellar.tiers.stores.file_settings import FileSettings, read_settings

MIB = 1 << 20


class Clock:
    """Seconds since 1970 that pass only when somebody looks."""

    def __init__(self):
        self.seconds = 1e9

    def __call__(self):
        self.seconds += 1
        return self.seconds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def only_file(path: Path) -> Path:
    (file,) = path.glob("*.pages")
    return file


def overwrite(file: Path, at: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(data)


def head_of(file: Path) -> segment.Head:
    with file.open("rb") as opened:
        return segment.read_head(opened.fileno())


def test_pages_outlive_the_store(path):
    store = file_store(path)
    put(store, [1, 2, 3])
    store.close()
    again = file_store(path)
    assert all(get(again, i) for i in (1, 2, 3))
    assert put(again, [3, 4]) == [True, True]
    assert (again.usage().pages, again.usage().damaged) == (4, 0)


def test_a_closed_store_says_so(path):
    store = file_store(path)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.has([name(1)])
    with pytest.raises(ValueError, match="closed"):
        put(store, [1])


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reopened", [False, True])
def test_the_least_recently_used_page_makes_room(path, reopened):
    clock = Clock()
    store = file_store(path, max_size=MIB, now=clock)
    kept = 0
    while store.usage().evicted == 0:
        put(store, [kept])
        kept += 1
    full = store.usage()
    assert not get(store, 0)
    assert get(store, 1)  # now used after 2
    if reopened:
        store.close()
        store = file_store(path, max_size=MIB, now=clock)
    put(store, [kept, kept + 1])
    assert [get(store, i) for i in (1, 2, 3, 4, kept)] == [True, False, False, True, True]
    assert store.usage().file_bytes == full.file_bytes <= MIB


def test_another_size_gets_room_from_files_that_were_used_before(path):
    store = file_store(path, max_size=4 * MIB, now=Clock())
    fill(store, range(1000))
    small = store.usage().pages
    assert put(store, [2000], 100_000) == [True]
    fill(store, range(2001, 2016), 100_000)
    assert all(get(store, i, 100_000) for i in range(2000, 2016))
    assert 0 < store.usage().pages - 16 < small
    assert get(store, 999)
    assert store.usage().file_bytes <= 4 * MIB


def test_a_smaller_max_size_holds_from_the_next_start_on(path):
    store = file_store(path, max_size=8 * MIB, now=Clock())
    fill(store, range(1500))
    before = store.usage().file_bytes
    store.close()
    store = file_store(path, max_size=2 * MIB)
    assert 0 < store.usage().file_bytes <= 2 * MIB < before
    assert get(store, 1499)


def test_a_page_larger_than_the_store_has_no_room(path):
    store = file_store(path, max_size=MIB)
    put(store, [1])
    assert put(store, [2], 2 * MIB) == [False]
    assert store.has([name(2)]) == [False]
    assert put(store, [3]) == [True]


def test_more_pages_at_once_than_there_is_room_for(path):
    store = file_store(path, max_size=MIB)
    done = put(store, range(1000))
    assert sum(done) == store.usage().pages
    assert 50 < sum(done) < 256
    assert [get(store, i) for i in range(1000)] == done


def test_free_space_is_left_to_others(path, monkeypatch):
    store = file_store(path, max_size=None, min_free_space=10 * MIB)
    free = 14 * MIB
    monkeypatch.setattr(store._index._folder, "free_bytes", lambda: free - store.usage_bytes)
    monkeypatch.setattr(type(store), "usage_bytes", property(lambda s: s._index._folder.file_bytes), raising=False)
    fill(store, range(3000))
    assert 3 * MIB < store.usage().file_bytes <= 4 * MIB
    free = 12 * MIB  # others want more: files go, one at a call
    for i in range(10):
        put(store, [5000 + i])
    assert store.usage().file_bytes <= 2 * MIB
    assert get(store, 5009)


def test_files_of_another_identity_are_unknown_and_make_room(path):
    store = file_store(path, max_size=4 * MIB, identity="one", now=Clock())
    fill(store, range(500))
    store.close()
    other = file_store(path, max_size=4 * MIB, identity="two", now=Clock())
    assert not get(other, 499)
    fill(other, range(1000, 1700))
    assert get(other, 1699)
    assert other.usage().file_bytes <= 4 * MIB
    other.close()
    again = file_store(path, max_size=4 * MIB, identity="one")
    assert 0 < again.usage().pages < 500


def test_a_full_disk_is_no_room(path, monkeypatch):
    monkeypatch.setattr(slotio, "NATIVE", False)
    store = file_store(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(segment, "_allocate", full)
        assert put(store, [1]) == [False]
    assert not list(path.glob("*.new"))
    put(store, [1])
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        assert put(store, [2]) == [False]
    assert store.has([name(1), name(2)]) == [True, False]
    assert put(store, [2]) == [True]


def test_a_medium_that_fails_is_an_error_and_nothing_is_findable(path, monkeypatch):
    monkeypatch.setattr(slotio, "NATIVE", False)
    store = file_store(path)
    put(store, [1])

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", broken)
        with pytest.raises(OSError, match="Input/output"):
            put(store, [2, 3])
    assert store.has([name(1), name(2), name(3)]) == [True, False, False]
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        with pytest.raises(OSError, match="Input/output"):
            get(store, 1)
    assert put(store, [1, 2]) == [True, True]
    assert get(store, 1)


@pytest.mark.parametrize("most", [1, 1000, 5000])
def test_reads_and_writes_that_end_early_go_on(path, monkeypatch, most):
    """A signal may interrupt a transfer of several megabytes."""
    pread, pwrite = os.preadv, os.pwritev

    def cut(views):
        return [memoryview(views[0])[:most]]

    monkeypatch.setattr(slotio, "NATIVE", False)
    store = file_store(path)
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: pwrite(fd, cut(views), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: pread(fd, cut(views), at))
    assert put(store, [1, 2]) == [True, True]
    assert get(store, 1)
    assert store.get([name(1), name(2)], [room(), room()]) == [True, True]


# --- what is not whole ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["image", "checksum", "name", "length"])
def test_a_flipped_bit_is_a_miss(path, where):
    store = file_store(path)
    put(store, [1, 2])
    store.close()
    file = only_file(path)
    slot = int(segment.Segment.open(file, slotio.medium(direct=False), writable=False).valid()[0])
    entry = segment.BLOCK + slot * segment.ENTRY.itemsize
    at = {"image": head_of(file).first_slot + slot * 8192 + 4321, "name": entry + 5}
    at |= {"checksum": entry + 33, "length": entry + 56}
    byte = file.read_bytes()[at[where]]
    overwrite(file, at[where], bytes([byte ^ 4]))
    store = file_store(path)
    assert not get(store, 1)
    if where == "name":
        false = bytearray(name(1))
        false[5] ^= 4
        assert store.get([bytes(false)], [room()]) == [False]
    assert get(store, 2)
    assert put(store, [1]) == [True]
    assert get(store, 1)


@pytest.mark.parametrize("left", [0, 10, 4096, 5000, 300_000])
def test_a_file_that_was_cut_short(path, left):
    store = file_store(path)
    fill(store, range(100))
    store.close()
    os.truncate(only_file(path), left)
    store = file_store(path)
    found = [i for i in range(100) if get(store, i)]
    assert len(found) < 100
    assert (len(found) > 0) == (left == 300_000)
    fill(store, range(100))
    assert all(get(store, i) for i in range(100))


def test_bytes_of_another_program_are_left_alone(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    (path / "x.pages").write_bytes(b"\x7fELF" * 5000)
    store = file_store(path)
    put(store, [1])
    assert get(store, 1)
    assert (path / "notes.txt").read_text() == "mine"


def test_a_file_of_another_format_is_not_read(path):
    store = file_store(path)
    put(store, [1])
    store.close()
    overwrite(only_file(path), 0, b"rootcellar pages 2\n")
    store = file_store(path)
    assert store.has([name(1)]) == [False]
    assert put(store, [1]) == [True]
    assert get(store, 1)


def test_an_index_full_of_noise_finds_nothing_wrong(path):
    store = file_store(path)
    fill(store, range(50))
    store.close()
    file = only_file(path)
    overwrite(file, segment.BLOCK, bytes(image(7, head_of(file).first_slot - segment.BLOCK)))
    store = file_store(path)
    assert not any(get(store, i) for i in range(50))
    fill(store, range(50))
    assert all(get(store, i) for i in range(50))


# --- several processes ------------------------------------------------------------------------------------------------


def in_another_process(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
    start += f"from stores import *\npath = Path({str(path)!r})\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False, timeout=60)


def test_a_second_writer_is_refused_and_told_who_writes(path):
    store = file_store(path)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} writes in .*only one may"):
        file_store(path)
    done = in_another_process("file_store(path)", path)
    assert f"process {os.getpid()} writes in" in done.stderr
    store.close()
    file_store(path).close()


def test_a_dead_writer_holds_no_lock(path):
    done = in_another_process("s = file_store(path); put(s, [1]); import os; os.kill(os.getpid(), 9)", path)
    assert done.returncode == -9
    assert get(file_store(path), 1)


def test_readers_see_what_is_put_while_they_run(path):
    store = file_store(path, max_size=2 * MIB, now=Clock())
    reader = file_store(path, read_only=True)
    assert reader.has([name(1)]) == [False]
    put(store, [1])
    assert reader.has([name(1)]) == [True]
    assert get(reader, 1)
    assert put(reader, [2]) == [False]
    fill(store, range(2, 500))  # evicts the first ones, and makes more files
    assert not get(reader, 1)
    assert [get(reader, i) for i in range(500)] == store.has([name(i) for i in range(500)])
    assert (
        "[True, False]"
        in in_another_process("s = file_store(path, read_only=True); print([get(s, 499), get(s, 1)])", path).stdout
    )
    store.close()
    assert get(reader, 499)


def test_a_reader_while_files_go(path):
    store = file_store(path, max_size=4 * MIB, now=Clock())
    fill(store, range(900))
    reader = file_store(path, read_only=True)
    assert get(reader, 899)
    fill(store, range(2000, 2016), 100_000)
    assert get(reader, 2015, 100_000)
    assert any(get(reader, i) for i in range(900))
    assert [get(reader, i) for i in range(900)] == store.has([name(i) for i in range(900)])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_read_as_users_write_them(path):
    read = read_settings({"path": str(path), "max_size": "2GB", "min_free_space": 5, "direct": True}, "me")
    assert read == FileSettings(path, max_size=2 * 10**9, min_free_space=5, identity="me", direct=True)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "name the folder"),
        ({"path": 3}, "path=3"),
        ({"path": "x", "max_size": "many"}, "max_size='many'"),
        ({"path": "x", "max_size": 10}, "at least 1 MiB"),
        ({"path": "x", "min_free_space": -1}, "min_free_space"),
        ({"path": "x", "direct": "yes"}, "true or false"),
        ({"path": "x", "shape": 1, "colour": 2}, "no setting colour, shape"),
    ],
)
def test_wrong_settings(extra, said):
    with pytest.raises(ConfigError, match=said):
        read_settings(extra)


def test_a_path_that_is_no_folder(path):
    path.write_text("a file")
    with pytest.raises(ConfigError, match="cannot be used"):
        file_store(path)
    with pytest.raises(ConfigError, match="no folder"):
        file_store(path.parent / "nothing", read_only=True)


# --- against a dict ---------------------------------------------------------------------------------------------------

SIZES = (5000, 8192, 20_000)
PAGES = st.integers(0, 59)


class AgainstDict(RuleBasedStateMachine):
    """Nothing is evicted here, so the store is a dict, whatever happens to its process."""

    @initialize(direct=st.booleans(), native=st.booleans())
    def begin(self, direct, native):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.native = slotio.NATIVE and native
        self.direct, self.model = direct, {}
        self.open()

    def open(self):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(slotio, "NATIVE", self.native)
            self.store = file_store(Path(self.folder.name), direct=self.direct, max_size=64 * MIB)

    @rule(pages=st.lists(PAGES, max_size=12), size=st.sampled_from(SIZES))
    def put(self, pages, size):
        assert put(self.store, pages, size) == [True] * len(pages)
        self.model.update(dict.fromkeys(pages, size))

    @rule(pages=st.lists(PAGES, max_size=12), size=st.sampled_from(SIZES))
    def get(self, pages, size):
        into = [room(size) for _ in pages]
        found = self.store.get([name(i) for i in pages], into)
        assert found == [self.model.get(i) == size for i in pages]
        assert all(view == image(i, size) for i, view, there in zip(pages, into, found, strict=True) if there)

    @rule()
    def reopen(self):
        self.store.close()
        self.open()

    @rule(page=PAGES)
    def damage(self, page):
        """Of one page, which is then a miss."""
        size = self.model.pop(page, None)
        if size is None:
            return
        found = self.store._index.find(name(page), size)
        overwrite(found.segment.path, found.segment.offset(found.slot) + size // 2, b"damaged!")
        assert not get(self.store, page, size)

    @invariant()
    def holds_what_the_dict_holds(self):
        assert self.store.has([name(i) for i in range(60)]) == [i in self.model for i in range(60)]

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


AgainstDict.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestAgainstDict = AgainstDict.TestCase


class Evicting(RuleBasedStateMachine):
    """With room for some: what is found is right, what was just confirmed is found, files stay within bounds."""

    @initialize()
    def begin(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.open()

    def open(self):
        self.store: FileStore = file_store(Path(self.folder.name), max_size=2 * MIB, now=self.clock)

    @rule(first=st.integers(0, 3000), count=st.integers(1, 60), size=st.sampled_from(SIZES))
    def put(self, first, count, size):
        pages = range(first, first + count)
        done = put(self.store, pages, size)
        assert any(done)
        for i, there in zip(pages, done, strict=True):
            assert get(self.store, i, size) == there

    @rule()
    def reopen(self):
        self.store.close()
        self.open()

    @invariant()
    def stays_small(self):
        assert self.store.usage().file_bytes <= 2 * MIB
        assert self.store.usage().damaged == 0

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


Evicting.TestCase.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
TestEvicting = Evicting.TestCase
