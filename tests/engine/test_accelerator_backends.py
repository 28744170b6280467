"""An engine on the kernels for TPUs and GPUs, interpreted: tokens of transformers, over pages that a CPU's wrote to a
store, and over recurrent states.
"""

import functools
import types

import pytest
from conversations import begin, go_on, tiered
from idle import check_idle

from rootcellar.models.mixers.recurrent import IN_PLACE
from rootcellar.ops.backends import BACKENDS, INTERPRETED
from rootcellar.pools.layouts import PaddedLatents, PagedHeads, PagedLatents, PairedHeads

ONE = [14]


@pytest.fixture
def interpreted(monkeypatch):
    """The backends, wherever this is."""
    for name in INTERPRETED:
        own = BACKENDS[name]
        attend = functools.partial(own.attend, interpret=True)
        anywhere = types.SimpleNamespace(prefers=own.prefers, lacks=_anywhere(own), attend=attend)
        monkeypatch.setitem(BACKENDS, name, anywhere)


def _anywhere(backend):
    return lambda layout, _: backend.unfit(layout)


@pytest.mark.parametrize(
    ("name", "backend", "layout"),
    [
        ("llama3-d128", "tpu", PairedHeads),
        ("deepseek3", "tpu", PaddedLatents),
        ("llama3-d128", "gpu", PagedHeads),
        ("deepseek3", "gpu", PagedLatents),
        ("gemma3", "gpu", PagedHeads),
    ],
)
def test_it_goes_on_with_what_a_cpu_cached(case_of, tmp_path, interpreted, name, backend, layout):
    case, folder = case_of(name)
    pages = {"path": str(tmp_path / "pages"), "min_free_space": 0, "max_size": "64MiB", "prefetch_threshold": 16}
    options = {"hicache_ratio": 4.0, "hicache_storage_prefetch_policy": "wait_complete", "page_size": 16}
    with tiered(folder, **options) as running:
        running.attach_storage("file", pages)
        begin(running, case, ONE)
        running._loop.call(running._loop.machine.life.settle)
    with tiered(folder, attention_backend=backend, **options) as running:
        running.attach_storage("file", pages)
        assert {type(pool.layout) for pool in running._loop.machine.runner.pools.values()} == {layout}
        (found,) = go_on(running, case, ONE)
        assert found["storage"] > 0
        check_idle(running)


@pytest.mark.parametrize("name", ["bamba", "qwen3-next"])
def test_recurrent_states_go_through_its_steps_where_they_lie(case_of, monkeypatch, name):
    monkeypatch.setitem(IN_PLACE, "xla", functools.partial(IN_PLACE["tpu"], interpret=True))
    case, folder = case_of(name)
    with tiered(folder, attention_backend="xla", page_size=16) as running:
        begin(running, case)
        go_on(running, case)
        check_idle(running)
