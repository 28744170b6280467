"""The NIXL store, on an agent that is slow; the real one is in ``tests/store_components``."""

import ctypes
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
from stores import image, name, put, room

from rootcellar.tiers.stores import nixl


class Agent:
    """Works in the memory that it was given until it was asked some times."""

    def __init__(self, *_):
        self.left, self.log = 0, []

    def create_backend(self, *_):
        pass

    def register_memory(self, *_):
        return None

    def deregister_memory(self, _):
        self.log.append(("deregistered", self.left))

    def get_xfer_descs(self, *_):
        return None

    def initialize_xfer(self, *_):
        return None

    def transfer(self, _):
        self.left = 3
        return "PROC"

    def check_xfer_state(self, _):
        self.left -= 1
        return "PROC" if self.left else "DONE"

    def release_xfer_handle(self, _):
        self.log.append(("released", self.left))


@pytest.fixture
def store(monkeypatch, tmp_path):
    api = SimpleNamespace(nixl_agent=Agent, nixl_agent_config=lambda **_: None)
    monkeypatch.setitem(sys.modules, "nixl", SimpleNamespace(_api=api))
    monkeypatch.setitem(sys.modules, "nixl._api", api)
    opened = []

    def store(**extra):
        opened.append(nixl.open_store({"path": str(tmp_path), **extra}, ""))
        return opened[-1]

    yield store
    for each in opened:
        each.close()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_call_does_not_return_while_a_transfer_works_in_its_memory(store, tmp_path):
    late = store(timeout=1e-6)
    with pytest.raises(OSError, match="NIXL did not end a transfer within 1e-06 s"):
        put(late, [1])
    log = late._writer._agent.log
    assert log
    assert all(left == 0 for _, left in log), log
    assert not files(tmp_path)


def test_a_file_that_cannot_get_its_name_is_taken_away(store, tmp_path):
    """A folder stands where it belongs."""
    store = store()
    (tmp_path / name(1).hex()[:1] / name(1).hex()).mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        put(store, [1])
    assert not files(tmp_path)
    assert put(store, [2]) == [True]


def test_a_file_that_others_took_away_hides_no_error(store, tmp_path, monkeypatch):
    late, transfer = store(timeout=1e-6), Agent.transfer

    def emptied(agent, handle):
        for path in files(tmp_path):
            path.unlink()
        return transfer(agent, handle)

    monkeypatch.setattr(Agent, "transfer", emptied)
    with pytest.raises(OSError, match="NIXL did not end a transfer"):
        put(late, [1])


class Bucket:
    """NIXL's agent with objects: each of its transfers takes some looks, and those of some keys fail."""

    objects: ClassVar[dict[str, bytes]] = {}
    failing: ClassVar[set[str]] = set()

    def __init__(self, *_):
        self.known, self.under_way = {}, 0

    def create_backend(self, plugin, settings):
        assert (plugin, settings["bucket"]) == ("OBJ", "b")

    def query_memory(self, descriptors, plugin, kind):
        assert (plugin, kind) == ("OBJ", "OBJ")
        return [{} if key in self.objects else None for *_, key in descriptors]

    def register_memory(self, descriptors, kind):
        if kind == "OBJ":
            assert not {number for _, _, number, _ in descriptors} & self.known.keys()
            self.known |= {number: key for _, _, number, key in descriptors}
        return (kind, descriptors)

    def deregister_memory(self, held):
        assert not self.under_way, "memory is taken away from a transfer"

    def get_xfer_descs(self, descriptors, _kind):
        return descriptors

    def initialize_xfer(self, verb, ours, theirs, _name):
        ((address, size, _),), ((_, _, number),) = ours, theirs
        return {"verb": verb, "at": (ctypes.c_char * size).from_address(address), "key": self.known[number], "looks": 3}

    def transfer(self, handle):
        self.under_way += 1
        handle["looks"] -= handle["key"] in self.failing
        return "PROC"

    def check_xfer_state(self, handle):
        handle["looks"] -= 1
        if handle["looks"] > 0:
            return "PROC"
        self.under_way -= 1
        if handle["key"] in self.failing:
            raise RuntimeError("NIXL_ERR_BACKEND")
        if handle["verb"] == "WRITE":
            self.objects[handle["key"]] = handle["at"].raw
        elif handle["key"] in self.objects:
            found = self.objects[handle["key"]]
            ctypes.memmove(handle["at"], found, min(len(found), len(handle["at"])))
        else:
            return "ERR"
        return "DONE"

    def release_xfer_handle(self, handle):
        assert handle["looks"] == 0, "a transfer is let go before it ended"


def test_of_objects_each_is_a_transfer_and_one_that_fails_harms_no_other(monkeypatch):
    api = SimpleNamespace(nixl_agent=Bucket, nixl_agent_config=lambda **_: None)
    monkeypatch.setitem(sys.modules, "nixl", SimpleNamespace(_api=api))
    monkeypatch.setitem(sys.modules, "nixl._api", api)
    for word in ("AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(word, "its own")
    store = nixl.open_store({"plugin": "OBJ", "bucket": "b", "prefix": "p/"}, "")
    assert put(store, range(70)) == [True] * 70
    Bucket.failing.add("p/" + name(3).hex())
    into = [room() for _ in range(6)]
    assert store.get([name(i) for i in (1, 2, 3, 4, 99, 5)], into) == [True, True, False, True, False, True]
    assert into[0] == image(1)
    assert into[5] == image(5)
    with pytest.raises(OSError, match="could read nothing of what is there"):
        store.get([name(3)], [room()])
    with pytest.raises(OSError, match="could not write 1 of 2 pages"):
        put(store, [3, 4])
    assert store.get([name(99)], [room()]) == [False]
    with pytest.raises(OSError, match="NIXL deletes no objects"):
        store.clear()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.has([name(1)])
