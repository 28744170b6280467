"""The NIXL store, on an agent that is slow; the real one is in ``tests/store_components``."""

import sys
from types import SimpleNamespace

import pytest
from stores import put

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


def test_a_call_does_not_return_while_a_transfer_works_in_its_memory(monkeypatch, tmp_path):
    api = SimpleNamespace(nixl_agent=Agent, nixl_agent_config=lambda **_: None)
    monkeypatch.setitem(sys.modules, "nixl", SimpleNamespace(_api=api))
    monkeypatch.setitem(sys.modules, "nixl._api", api)
    store = nixl.open_store({"path": str(tmp_path), "timeout": 1e-6}, "")
    with pytest.raises(OSError, match="NIXL did not end a transfer within 1e-06 s"):
        put(store, [1])
    log = store._writer._agent.log
    assert log
    assert all(left == 0 for _, left in log), log
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    store.close()
