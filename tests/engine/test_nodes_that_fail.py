"""Whatever becomes of a node or of the wire, at whatever moment: everybody gets an answer or an error in time, nothing
is left behind on either node, and the next request works. Nodes are processes, killed and stopped as such.
"""

import contextlib

import numpy as np
import pytest
from conversations import FAMILIES

from nodes import FAULTS, LONG, Both

DAY = len(FAULTS)


def can_have(wire):
    """Of mooncake and nixl in an environment that has the library."""
    pytest.importorskip({"mooncake": "mooncake.engine", "nixl": "nixl._api"}.get(wire, "jax"))


@pytest.mark.parametrize(
    ("wire", "seeds"),
    [
        ("tcp", range(DAY)),
        pytest.param("tcp", range(DAY, 300), marks=pytest.mark.long),
        pytest.param("jax", range(DAY, 2 * DAY), marks=pytest.mark.long),
        pytest.param("mooncake", range(DAY, 5 * DAY), marks=pytest.mark.long),
        pytest.param("nixl", range(DAY, 5 * DAY), marks=pytest.mark.long),
    ],
)
def test_a_kill_a_stop_or_a_cut_at_any_moment(case_of, tmp_path, wire, seeds):
    can_have(wire)
    case, folder = case_of("qwen2-4kv")
    with contextlib.closing(Both(case, folder, tmp_path, wire)) as both:
        both.run_all(seeds)
    assert any(name.endswith("answered") for name in both.outcomes)
    assert any(not name.endswith("answered") for name in both.outcomes)


@pytest.mark.long
@pytest.mark.parametrize("wire", ["jax", "mooncake", "nixl"])
@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_over_the_wires_of_others(case_of, tmp_path, name, page, chunk, wire):
    can_have(wire)
    case, folder = case_of(name)
    options = {"page_size": page, "chunked_prefill_size": chunk, "max_total_tokens": 1024}
    with contextlib.closing(Both(case, folder, tmp_path, wire, **options)) as both:
        for salt in ("cold", "cold", "again"):
            for i in LONG:
                assert both.ask_about(i, np.random.default_rng(i), salt)[0] == "answered"
        both.is_whole(4)
        counts = [node.do("pages") for node in (both.prefill, both.decode)]
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("tp_sizes", [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.long) for name in FAMILIES[1:])])
def test_nodes_of_unlike_numbers_of_devices(case_of, tmp_path, name, tp_sizes):
    case, folder = case_of(name)
    with contextlib.closing(Both(case, folder, tmp_path, tp_sizes=tp_sizes)) as both:
        for seed in range(4):
            assert both.ask(np.random.default_rng(seed), f"{seed}")[0] == "answered"
        both.is_whole(4)
        counts = [node.do("pages") for node in (both.prefill, both.decode)]
        assert counts[0] == counts[1] > 0
