"""A type of cache that nobody knows, eight bits with scales, is a layout and nothing else: it runs, and is counted."""

import types
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import make_config
from rootcellar.errors import ConfigError
from rootcellar.models.config import read_config
from rootcellar.models.kinds import paging
from rootcellar.models.params import init_params
from rootcellar.ops.backends import BACKENDS, choose_backend, xla
from rootcellar.pools.layouts import LAYOUTS
from rootcellar.pools.layouts.layout import as_it_lies
from rootcellar.runner import Batch, BatchPart, Placement, Programs, Runner, Shapes, pools_of

PAGE, WIDTH = 4, 8


@dataclass(frozen=True)
class Eight:
    """Keys and values by head in 8 bits, with a scale for each vector in an array of its own."""

    name: ClassVar[str] = "eight"
    form: ClassVar[str] = "heads"
    axes: ClassVar[tuple] = ((None, None, "kv_heads"), (None, None, "kv_heads"))
    image: ClassVar[tuple] = ((0, 1, 2, 3), (0, 1, 2))
    turn: ClassVar[None] = None
    unfolded = property(as_it_lies)
    kv_heads: int
    head_dim: int
    page_size: int

    def buffers(self, pages):
        shape = (pages, 2, self.kv_heads, self.page_size)
        return jax.ShapeDtypeStruct((*shape, self.head_dim), jnp.int8), jax.ShapeDtypeStruct(shape, jnp.float32)

    def write(self, buffers, pages, offsets, parts):
        values, scales = buffers
        kv = jnp.stack(list(parts), axis=1).astype(jnp.float32)
        scale = jnp.max(jnp.abs(kv), axis=-1) / 127 + 1e-9
        narrow = jnp.round(kv / scale[..., None]).astype(jnp.int8)
        return values.at[pages, :, :, offsets].set(narrow), scales.at[pages, :, :, offsets].set(scale)

    def read(self, buffers, pages):
        values, scales = (array[pages] for array in buffers)
        kv = values.astype(jnp.float32) * scales[..., None]
        return kv[..., 0, :, :, :], kv[..., 1, :, :, :]


@pytest.fixture
def eight(monkeypatch):
    """The layout, entered into the table that its file would be entered into."""
    monkeypatch.setitem(
        LAYOUTS, ("heads", "eight"), lambda stored, _, size: Eight(stored.kv_heads, stored.head_dim, size)
    )


def runner_of(cfg, kv_cache_dtype, backend=None):
    placement, pages = Placement(cfg), paging(cfg, kv_cache_dtype, PAGE, arena=True)
    backend = backend or choose_backend("auto", pages.attended, "cpu")
    programs = Programs(placement, np.dtype(np.float32), pages, backend, Shapes(16, 2, 1), WIDTH, 0)
    pools = pools_of(pages, placement, dict.fromkeys(pages.pools, 16))
    return Runner(programs, placement.place(init_params(cfg, 0, np.float32)), pools)


def answers(runner):
    """Logits after a prompt of 24 and after one more token, through pages in any order."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 500, 25)
    tables = {kind.name: np.zeros((2, WIDTH), np.int32) for kind in runner.programs.paging.kinds}
    for table in tables.values():
        table[1] = rng.permutation(np.arange(1, 17))[:WIDTH]
    prefill, _ = runner.step(Batch.build([BatchPart(1, 0, tokens[:24])], tables, 16))
    decode, _ = runner.step(Batch.build([BatchPart(1, 24, tokens[24:])], tables, 1))
    return np.stack([prefill[0], decode[0]])


def test_a_quantised_cache_runs_and_is_counted_by_its_layout_alone(eight):
    cfg = read_config(make_config("qwen2", num_hidden_layers=1))
    wide, narrow = runner_of(cfg, "float32"), runner_of(cfg, "eight")
    assert narrow.programs.backend == "xla"
    found, expected = answers(narrow), answers(wide)
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    vectors = 2 * 2 * PAGE  # keys and values, heads
    layout = narrow.pools["full"].layout
    assert narrow.placement.page_bytes(layout) == vectors * (64 + 4)
    assert narrow.pools["full"].nbytes == 17 * vectors * (64 + 4)
    assert all(buffer.shape[0] == 17 for buffer in jax.tree.leaves(narrow.pools["full"].buffers))


def test_a_backend_is_a_file_that_says_what_it_lacks(eight, monkeypatch):
    asked = []

    def attend(layout, reach):
        asked.append(layout.name)
        return xla.attend(layout, reach)

    def lacks(layout, platform):
        return None if layout.name == "eight" else f"it reads eights alone, on a {platform} too"

    monkeypatch.setitem(BACKENDS, "mine", types.SimpleNamespace(prefers=xla.prefers, lacks=lacks, attend=attend))
    cfg = read_config(make_config("qwen2", num_hidden_layers=1))
    assert np.isfinite(answers(runner_of(cfg, "eight", "mine"))).all()
    assert set(asked) == {"eight"}
    eights, wide = (paging(cfg, dtype, PAGE, arena=False).attended for dtype in ("eight", "float32"))
    assert choose_backend("mine", eights, "cpu") == "mine"
    with pytest.raises(ConfigError, match=r"'mine' cannot be used: it reads eights alone, on a cpu too. Use .*'auto'"):
        choose_backend("mine", wide, "cpu")
