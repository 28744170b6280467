"""Prefill and decode apart over a library that stores use, too: bytes of two processes, tokens of two nodes."""

import contextlib

import pytest

import lending
from checkpoints import golden
from nodes import FAULTS, Both

WIRES = {"mooncake": "mooncake", "nixl": "nixl"}
"""By the store's backend."""


@pytest.fixture(scope="module")
def wire(component):
    if component.backend not in WIRES:
        pytest.skip(f"no wire: {component.backend}")
    return WIRES[component.backend]


def test_one_process_lends_and_another_fetches(wire):
    lending.check(wire)


def test_nodes_that_fail_answer_in_time_and_leave_nothing_behind(wire, tmp_path):
    case = golden("qwen2-4kv")
    case.make(tmp_path / "model")
    with contextlib.closing(Both(case, tmp_path / "model", tmp_path, wire)) as both:
        both.run_all(range(len(FAULTS)))
    assert any(name.endswith("answered") for name in both.outcomes)
