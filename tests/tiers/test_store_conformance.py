"""What every store has to keep to (``rootcellar.tiers.conformance``), kept by those that need nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from stores import MemoryStore, ToldStore, file_store, get, name, put

from rootcellar.tiers.conformance import suite as conformance
from rootcellar.tiers.conformance.pages import room
from rootcellar.tiers.conformance.subject import Subject
from rootcellar.tiers.conformance.suite import *  # noqa: F403  (the tests; ``subject`` is ours)
from rootcellar.tiers.guard import Guard, GuardSettings
from rootcellar.tiers.stores import open_store
from rootcellar.tiers.stores.chain import StoreChain
from rootcellar.tiers.stores.dynamic import open_class
from rootcellar.tiers.stores.hf3fs import Hf3fsSettings, Hf3fsStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_store.py"


def memory(_, wrap=lambda store: store):
    objects = {}
    return Subject(lambda: wrap(MemoryStore(objects)), lambda: wrap(MemoryStore(objects)))


def files(path, wrap=lambda store: store, **settings):
    """One process writes into a folder, any number read."""
    settings = {"max_size": 256 << 20, **settings}
    reader = {**settings, "read_only": True}
    return Subject(lambda: wrap(file_store(path, **settings)), lambda: wrap(file_store(path, **reader)))


def own(path):
    def opened():
        return open_class(str(EXAMPLE), "FolderStore", {"path": str(path)}, "")

    return Subject(opened, opened)


def chained(path):
    """A file store in front of one in memory, and in a second chain the same the other way round."""
    objects = {}

    def opened(**settings):
        nearer = file_store(path, max_size=256 << 20, **settings)
        return StoreChain([Guard(nearer), Guard(MemoryStore(objects))])

    return Subject(opened, lambda: opened(read_only=True))


def slots(path):
    path.mkdir()

    def opened():
        return Hf3fsStore(Hf3fsSettings(path / "pages", file_size=64 << 20))

    return Subject(opened, opened)


SUBJECTS = {
    "memory": memory,
    "file": files,
    "file-direct": lambda path: files(path, direct=True),
    "file-fsync": lambda path: files(path, fsync=True),
    "guarded memory": lambda path: memory(path, lambda store: Guard(ToldStore(store))),
    "guarded file": lambda path: files(path, lambda store: Guard(ToldStore(store))),
    "own": own,
    "chain": chained,
    "hf3fs": slots,
}


@pytest.fixture(params=SUBJECTS)
def subject(request, tmp_path):
    return SUBJECTS[request.param](tmp_path / "store")


@pytest.mark.long
def test_an_image_of_64_mib(guarded):
    conformance.test_an_image_of_64_mib(guarded)


def conforms(*words, cwd):
    command = [sys.executable, "-m", "pytest", "-p", "rootcellar.tiers.conformance.plugin", "-p", "no:schemathesis"]
    return subprocess.run([*command, "-q", *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_users_own_store_is_tried_by_one_command(tmp_path):
    """The example passes; one that mixes pages up does not. What lies about where pytest is started is not run."""
    (tmp_path / "test_broken.py").write_text("def test_broken(): raise AssertionError\n")
    extra = ("--rootcellar-store-extra-config", f'{{"path": "{tmp_path / "pages"}"}}')
    good = conforms(
        "--rootcellar-store",
        f"{EXAMPLE}:FolderStore",
        *extra,
        "-k",
        "put_is_there or any_mix or not_the_page or at_once",
        cwd=tmp_path,
    )
    assert good.returncode == 0, good.stdout + good.stderr
    wrong = "from own_store import FolderStore as _F\nclass Wrong(_F):\n"
    wrong += "    def get(self, names, into): return super().get(list(names)[::-1], into)\n"
    (tmp_path / "wrong.py").write_text(f"import sys; sys.path.append({str(EXAMPLE.parent)!r})\n{wrong}")
    words = ("--rootcellar-store", "wrong.py:Wrong", *extra, "-k", "put_is_there or not_the_page")
    bad = conforms(*words, cwd=tmp_path)
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "test_broken" not in good.stdout + bad.stdout
    none = conforms("--rootcellar-store", "nothere:Class", "-k", "nothing_of_nothing", cwd=tmp_path)
    assert "module_path='nothere' is not allowed: it cannot be imported" in none.stdout


def test_a_chain_reads_through_and_writes_through():
    near, far = {}, {}
    chain = StoreChain([Guard(MemoryStore(near)), Guard(MemoryStore(far))])
    put(chain, [1, 2])
    assert len(near) == len(far) == 2
    near.clear()
    assert get(chain, 1)
    assert list(near) == [name(1)]
    assert near[name(1)] == far[name(1)]
    far.clear()
    assert chain.has([name(1), name(2)]) == [True, False]


def test_one_store_of_a_chain_that_fails_is_done_without():
    broken = ToldStore(MemoryStore())
    broken.error = OSError("the cable is out")
    chain = StoreChain([Guard(broken), Guard(MemoryStore())])
    for i in range(8):
        assert put(chain, [i]) == [True]
        assert get(chain, i)
    assert broken.calls <= 3


def test_a_call_of_a_chain_takes_no_longer_than_its_deadline():
    """However many of its stores are slow, and though each had time enough of its own."""
    seconds = 0.0

    def slow():
        nonlocal seconds
        seconds += 4

    stores = [ToldStore(MemoryStore()) for _ in range(4)]
    own = GuardSettings(deadline=60, failures=100)
    chain = StoreChain([Guard(store, own, now=lambda: seconds) for store in stores], 10, lambda: seconds)
    put(Guard(stores[2].inner), [1])
    for store in stores:
        store.work = slow
    for call in (lambda: chain.has([name(2)]), lambda: put(chain, [3]), lambda: get(chain, 1)):
        seconds = 0.0
        call()
        assert seconds == 12  # the last of three was begun before ten were over
    assert [store.calls for store in stores] == [3, 3, 3, 0]
    seconds = 0.0
    stores[0].work = stores[1].work = lambda: None
    assert get(chain, 1)
    assert seconds == 4
    assert get(chain, 1)
    assert seconds == 4, "it was put into those before it"


def test_all_pieces_of_a_call_of_a_chain_take_no_longer_than_its_deadline():
    """Its guard gives it a few pages at a time."""
    seconds = 0.0

    def slow():
        nonlocal seconds
        seconds += 4

    stores = [ToldStore(MemoryStore()) for _ in range(2)]
    own = GuardSettings(deadline=60)
    chain = StoreChain([Guard(store, own, now=lambda: seconds) for store in stores], 10, lambda: seconds)
    guard = Guard(chain, GuardSettings(deadline=10, pages_at_once=2, failures=100), now=lambda: seconds)
    for store in stores:
        store.work = slow
    names = [name(i) for i in range(8)]
    into = [room() for _ in names]
    for call in (lambda: guard.has(names), lambda: guard.put(names, into), lambda: guard.get(names, into)):
        seconds = 0.0
        call()
        assert seconds == 12  # the second piece was begun before ten were over, and asked one of them


def test_the_stores_of_a_chain_share_its_deadline(tmp_path):
    """But for one that has its own."""
    members = [{"backend": "hf3fs", "file_path_prefix": str(tmp_path / f"{i}"), "file_size": "1MiB"} for i in range(3)]
    members[1]["deadline"] = 3
    guard = open_store("chain", {"stores": members, "deadline": 6}, "tests")
    chain = guard._store
    assert (guard._settings.deadline, chain._deadline) == (6, 6)
    assert [store._settings.deadline for store in chain._stores] == [2, 3, 2]
    guard.close()
