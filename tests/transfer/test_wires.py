"""Wires beside the connection, between two processes. Those of others' libraries: ``tests/store_components``."""

import numpy as np
import pytest

import lending
from rootcellar.errors import ConfigError
from rootcellar.transfer.wires import open_wire
from rootcellar.transfer.wires.loans import Loans
from rootcellar.transfer.wires.tcp import WireError


def test_one_process_lends_and_another_fetches_by_jax():
    lending.check("jax")


def test_tcp_needs_none():
    assert open_wire("tcp", "127.0.0.1", 1) is None


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match=r"'mooncake' cannot be used: .* pip install 'rootcellar\[mooncake\]'"):
        open_wire("mooncake", "127.0.0.1", 1)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_nobody_can_reach_is_refused(host):
    with pytest.raises(ConfigError, match="disaggregation_host"):
        open_wire("jax", host, 1)


class Far:
    """Another node's memory, which is read when somebody looks, or fails, or hangs."""

    def __init__(self, loans):
        self.loans, self.there, self.says = loans, Loans(1000), True

    def begin(self, there, here, nbytes):
        def poll():
            if self.says == "fails":
                raise WireError("gone")
            if self.says:
                source, to = there - self.there.address, here - self.loans.address
                self.loans.memory[to : to + nbytes] = self.there.memory[source : source + nbytes]
            return self.says

        return poll


def test_what_is_read_too_late_keeps_its_place_until_it_is_over():
    loans = Loans(1000)
    far = Far(loans)
    content = np.arange(150, dtype=np.uint8)
    ticket = far.there.lend(content, 0)
    with loans.fetch(far.begin, ticket, 150, 1) as found:
        assert np.array_equal(found, content)
        assert loans.lent == 150
    far.says = False
    for _ in range(6):
        with pytest.raises(TimeoutError), loans.fetch(far.begin, ticket, 150, 0.01):
            pass
    assert loans.lent == 900, "somebody may still write there"
    with pytest.raises(TimeoutError, match="no room"), loans.fetch(far.begin, ticket, 150, 0.01):
        pass
    far.says = "fails"
    with pytest.raises(WireError), loans.fetch(far.begin, ticket, 150, 0.01):
        pass
    assert loans.lent == 0
    with pytest.raises(OSError, match="do not fit"):
        loans.lend(np.zeros(1001, np.uint8), 0)


def test_pieces_that_are_free_side_by_side_are_one():
    loans = Loans(300)
    first, second, third = (loans.lend(np.full(100, i, np.uint8), 0) for i in range(3))
    assert loans.lend(np.zeros(1, np.uint8), 0.01) is None
    loans.withdraw(first)
    loans.withdraw(second)
    loans.withdraw(second)  # again
    assert loans.lend(np.zeros(200, np.uint8), 0) == first
    assert loans.lent == 300
    assert loans.memory[200:].tolist() == [2] * 100
    loans.withdraw(third)
