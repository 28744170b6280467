"""The NIXL store, on an agent that is slow; the real one is in ``tests/store_components``."""

import sys
from types import SimpleNamespace

import pytest
from stores import name, put

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
