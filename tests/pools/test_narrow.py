"""Layouts of few bits against slow, obvious numpy: the nearest value of the grid, by a scale that is stored."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.errors import ConfigError
from rootcellar.ops import kernels
from rootcellar.ops.backends import Reach, attention, xla
from rootcellar.plan.grids import E2M1, E4M3, E5M2, INT8, NARROW
from rootcellar.plan.stored import Heads, Latents
from rootcellar.pools.layouts import LAYOUTS, layout_of
from rootcellar.pools.layouts.codes import code_arrays, decode, encode, hadamard, turned

GRIDS = (INT8, E4M3, E5M2, E2M1)
BYTES = np.arange(256, dtype=np.uint8)


def finite(values, least=0.0):
    """Sorted; but for zero none below ``least``."""
    return np.unique(values[np.isfinite(values) & ((np.abs(values) >= least) | (values == 0))])


VALUES = {
    INT8: np.arange(-127, 128, dtype=np.float32),
    E4M3: finite(BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32), 2.0**-6),
    E5M2: finite(BYTES.view(ml_dtypes.float8_e5m2).astype(np.float32), 2.0**-14),
    E2M1: finite(BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32)),
}
# Scales of 8 bits: a float16 without a sign and without its last 7 bits.
SCALES = np.unique((np.arange(247, dtype=np.uint16) << 7).view(np.float16).astype(np.float32))


def nearest(values, x):
    """Of sorted values the nearest to each x; at a tie the larger."""
    at = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[at - 1], values[at]
    return np.where(x - low < high - x, low, high)


def reference(grid, x):
    """What is read of the vectors ``x`` [..., dim], block by block."""
    dim, block = x.shape[-1], grid.block or x.shape[-1]
    read = np.empty_like(x)
    for at in np.ndindex(*x.shape[:-1]):
        for start in range(0, dim, block):
            some = x[at][start : start + block]
            most = np.abs(some).max()
            if grid == E2M1:
                scales = [nearest(SCALES, np.float32(np.float16(most / np.float32(top)))) for top in (6, 4)]
            else:
                scales = [np.float32(np.float32(most / grid.top).astype(ml_dtypes.bfloat16))]
            tries = [nearest(VALUES[grid], some / s) * s if s else np.zeros_like(some) for s in scales]
            errors = [((some - t) ** 2).sum() for t in tries]
            read[at][start : start + block] = tries[int(np.argmin(errors))]
    return read


def error_of(grid, x):
    """The root of the mean squared error of each vector, of the code and of the reference."""
    codes, scales = jax.jit(encode, static_argnums=0)(grid, x)
    ours = np.asarray(jax.jit(decode, static_argnums=0)(grid, codes, scales))
    return [np.sqrt(((x - read) ** 2).mean(axis=-1)) for read in (ours, reference(grid, x))]


@st.composite
def vectors(draw):
    """Heads as models have them: any size, some elements much larger than others, some zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((3, 2, 32)).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-3, 3)))
    x[:, :, draw(st.integers(0, 31))] *= draw(st.sampled_from([0, 1, 30]))
    if draw(st.booleans()):
        x[0, 0] = 0
    return x


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@settings(max_examples=12)
@given(x=vectors())
def test_what_is_read_is_the_nearest_value_of_the_grid(grid, x):
    ours, slow = error_of(grid, x)
    np.testing.assert_allclose(ours, slow, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("grid", "most"), [(INT8, 0.008), (E4M3, 0.03), (E5M2, 0.06), (E2M1, 0.1)], ids=str)
def test_errors_are_those_that_a_grid_of_so_many_bits_has(grid, most):
    """Of normal numbers, each relative to its vector."""
    x = np.random.default_rng(1).standard_normal((50, 1, 64)).astype(np.float32)
    ours, _ = error_of(grid, x)
    assert most / 2.5 < ours.mean() < most
    for factor in (2.0**-8, 2.0**8):  # a vector's size does not matter
        scaled, _ = error_of(grid, x * np.float32(factor))
        np.testing.assert_allclose(scaled, ours * factor, rtol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_codes_have_the_shapes_and_bytes_that_are_counted(grid):
    x = np.zeros((2, 3, 64), np.float32)
    expected = code_arrays(grid, (2, 3), 64)
    found = encode(grid, x)
    assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in expected]
    assert sum(a.nbytes for a in found) == 6 * grid.vector_bytes(64)
    assert not np.asarray(decode(grid, *found)).any()


def test_what_is_not_finite_stays_where_it_is():
    """One broken token must not look whole, nor break others."""
    x = np.ones((3, 1, 32), np.float32)
    x[1] = np.nan
    for grid in GRIDS:
        read = np.asarray(decode(grid, *encode(grid, x)))
        assert np.isfinite(read[[0, 2]]).all()
        assert np.isnan(read[1]).any()


@pytest.mark.parametrize("dim", [16, 64, 96, 80, 7])
def test_a_rotation_is_its_own_inverse_and_keeps_products(dim):
    turn = hadamard(dim)
    x = np.random.default_rng(6).standard_normal((5, 2, dim)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(turned)(x), x @ turn, atol=1e-5)
    np.testing.assert_allclose(turn @ turn, np.eye(dim), atol=1e-6)
    np.testing.assert_array_equal(turn, turn.T)
    outlier = np.zeros(dim, np.float32)
    outlier[3] = 1
    np.testing.assert_allclose(np.abs(outlier @ turn).max(), (dim & -dim) ** -0.5, rtol=1e-6)


NAMES = [(form, name) for form, name in sorted(LAYOUTS) if name in NARROW and form in ("heads", "latents")]
STORED = {"heads": Heads(2, 32), "latents": Latents(32, 16)}


def parts_of(rng, form, tokens):
    shape = {"heads": (tokens, 2, 32), "latents": (tokens, 48)}[form]
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(2 if form == "heads" else 1)]


@pytest.mark.parametrize(("form", "name"), NAMES)
def test_a_token_is_read_where_it_was_written_and_nothing_else_is_touched(form, name):
    rng = np.random.default_rng(2)
    layout = layout_of(STORED[form], name, 4)
    buffers = [jnp.zeros(a.shape, a.dtype) for a in layout.buffers(6)]
    first, second = parts_of(rng, form, 5), parts_of(rng, form, 3)
    pages, offsets = np.array([2, 2, 2, 2, 4]), np.array([0, 1, 2, 3, 0])
    write = jax.jit(layout.write)

    def read(buffers, pages):
        turn = np.eye(first[0].shape[-1], dtype=np.float32) if layout.turn is None else layout.turn
        return [np.asarray(part) @ turn for part in layout.read(buffers, pages)]

    buffers = write(buffers, pages, offsets, first)
    before = read(buffers, np.arange(6))
    buffers = write(buffers, np.array([4, 4, 1]), np.array([1, 3, 2]), second)
    for was, now, old, new in zip(before, read(buffers, np.arange(6)), first, second, strict=True):
        was, now = (
            np.moveaxis(np.array(a), 2, 1) if form == "heads" else np.array(a) for a in (was, now)
        )  # page, token
        for page, offset, part in zip(pages, offsets, old, strict=True):
            assert np.abs(now[page, offset] - part).max() < np.abs(part).max() / 5
        for page, offset, part in zip((4, 4, 1), (1, 3, 2), new, strict=True):
            assert np.abs(now[page, offset] - part).max() < np.abs(part).max() / 5
            was[page, offset] = now[page, offset]
        np.testing.assert_array_equal(was, now)


BACKENDS = [
    pytest.param(
        backend, form, name, marks=[] if backend == "xla" or kernels.built() else pytest.mark.skip("not built")
    )
    for form, name in NAMES
    for backend in ("xla", "native")
    if backend == "xla" or form == "heads"
]


@pytest.mark.parametrize(("backend", "form", "name"), BACKENDS)
def test_attention_is_that_over_what_was_read(backend, form, name):
    """A prompt in tiles, then a token, written out in numpy over the vectors that the reference reads, turned back."""
    rng = np.random.default_rng(3)
    tokens, page, group = 150, 16, 2
    layout = layout_of(STORED[form], name, page)
    parts = parts_of(rng, form, tokens)
    dim = parts[0].shape[-1]
    q = rng.standard_normal((tokens, 4, dim)).astype(np.float32)
    table = np.zeros((2, 12), np.int32)
    table[1, :10] = rng.permutation(np.arange(1, 11))
    buffers = [jnp.zeros(a.shape, a.dtype) for a in layout.buffers(12)]
    sinks = (jnp.full(4, -jnp.inf),) if form == "heads" else ()
    count = 1 + len(parts) + len(sinks) + 3
    attend = jax.jit(
        attention(backend, layout, Reach("sliding_window", 100, dim**-0.5)),
        donate_argnums=range(count, count + len(buffers)),
    )
    batches = []
    for start, stop, tile in ((0, tokens - 1, 16), (tokens - 1, tokens, 1)):
        more = -(stop - start) % tile
        given = [np.pad(a[start:stop], [(0, more)] + [(0, 0)] * (a.ndim - 1)) for a in (q, *parts)]
        positions = np.pad(np.arange(start, stop, dtype=np.int32), (0, more), constant_values=-1)
        out, *buffers = attend(*given, *sinks, table, np.ones(len(positions) // tile, np.int32), positions, *buffers)
        batches.append(np.asarray(out)[: stop - start])
    found = np.concatenate(batches)
    turn = np.eye(dim, dtype=np.float32) if layout.turn is None else layout.turn
    narrow = NARROW[name]
    if form == "heads":
        keys, values = (reference(grid, x @ turn) for grid, x in zip((narrow.keys, narrow.values), parts, strict=True))
        keys, values = (np.repeat(x @ turn, group, axis=1) for x in (keys, values))
    else:
        turned = parts[0] @ turn
        held = reference(narrow.keys, turned[:, :32])
        rope = turned[:, 32:].astype(ml_dtypes.bfloat16).astype(np.float32)
        keys = values = np.repeat((np.concatenate([held, rope], axis=-1) @ turn)[:, None], 4, axis=1)
    for at in (0, 15, 97, 120, tokens - 2, tokens - 1):
        seen = slice(max(0, at - 99), at + 1)
        weights = np.exp(np.einsum("hd,thd->ht", q[at], keys[seen]) * dim**-0.5)
        expected = np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), values[seen])
        np.testing.assert_allclose(found[at], expected, atol=2e-3)


@functools.cache
def writers(name, turns, vectors, kv_heads, dim, page):
    """What makes empty pages, and compiled functions that write tokens into them: alone, and to attend to them."""
    layout = dataclasses.replace(layout_of(Heads(kv_heads, dim), name, page), turned=turns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTCELLAR_VECTORS", vectors)
        attend = attention("native", layout, Reach("full", 0, dim**-0.5))

    def alone(buffers, parts, *where):
        return xla.write(layout, buffers, parts, *where)

    def attending(buffers, parts, *where):
        sinks = jnp.full(kv_heads, -jnp.inf)
        return attend(jnp.ones_like(parts[0]), *parts, sinks, *where, *buffers)[1:]

    return layout.buffers, jax.jit(alone, donate_argnums=0), jax.jit(attending, donate_argnums=0)


@st.composite
def tokens_of(draw, tokens, kv_heads, dim):
    """Keys and values as no model has them beside such as models have."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = []
    for _ in range(2):
        x = rng.standard_normal((tokens, kv_heads, dim)) * 10.0 ** rng.integers(-6, 6, (tokens, kv_heads, 1))
        whole = rng.random((tokens, kv_heads, 1)) < 0.3  # such are at ties of their grids
        x = np.where(whole, np.round(x * 4) * 2.0 ** rng.integers(-30, 20, (tokens, kv_heads, 1)), x).astype(np.float32)
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, tokens - 1)), draw(st.integers(0, kv_heads - 1))
            odd = draw(
                st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, 1e-39, 2e-37, 1e-30, 3e-6, 6e4 * 6])
            )
            x[at][: draw(st.sampled_from([1, dim]))] = odd
        parts.append(x)
    return parts


@pytest.mark.skipif(kernels.built() is None, reason="not built")
@pytest.mark.parametrize("vectors", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("name", NARROW)
@settings(max_examples=25)
@given(data=st.data())
def test_codes_are_the_same_whoever_makes_them(name, vectors, data):
    """XLA for a batch of any shape, or a kernel, by decoding or by tiles of a prompt: bit for bit."""
    if not kernels.runs_vectors(vectors):
        pytest.skip(f"this processor does not have {vectors}")
    turns = NARROW[name].turned ^ (data.draw(st.integers(0, 3)) == 0)
    kv_heads, dim, page = data.draw(st.sampled_from([(1, 16, 4), (3, 64, 16), (2, 96, 1), (1, 128, 16)]))
    buffers, *both = writers(name, turns, vectors, kv_heads, dim, page)
    positions, tile = data.draw(st.sampled_from([((0, 1, 2, 3), 1), ((2,), 1), ((0, 1, 2, -1), 4)]))
    parts = data.draw(tokens_of(len(positions), kv_heads, dim))
    where = np.array([[0] * 4, [3, 1, 4, 2]], np.int32), np.ones(len(positions) // tile, np.int32), np.int32(positions)
    found = [write([jnp.zeros(a.shape, a.dtype) for a in buffers(5)], parts, *where) for write in both]
    for one, other in zip(*found, strict=True):  # but for page 0, where padding may go
        np.testing.assert_array_equal(*(np.asarray(a)[1:].view(np.uint8) for a in (one, other)))


@pytest.mark.skipif(kernels.built() is None, reason="not built")
@pytest.mark.parametrize("index", range(4))
def test_pools_that_are_not_what_the_grids_say_are_not_read(index):
    layout = layout_of(Heads(2, 32), "k8v4", 16)
    buffers = [jnp.zeros(a.shape, a.dtype) for a in layout.buffers(3)]
    buffers[index] = buffers[index][:, :, :8]
    part, sinks = jnp.zeros((1, 2, 32)), jnp.full(2, -jnp.inf)
    attend = jax.jit(attention("native", layout, Reach("full", 0, 1.0)), donate_argnums=range(7, 11))
    with pytest.raises(Exception, match="paged attention: codes and scales have"):
        jax.block_until_ready(
            attend(part, part, part, sinks, jnp.ones((1, 1), int), jnp.zeros(1, int), jnp.zeros(1, int), *buffers)
        )


@pytest.mark.parametrize(
    ("name", "least"), [("int8", 1.9), ("fp8_e4m3", 1.9), ("fp8_e5m2", 1.9), ("k8v4", 2.4), ("fp4_e2m1", 3.4)]
)
def test_a_token_takes_so_much_less_than_in_bfloat16(name, least):
    for head_dim in (64, 128):
        stored = Heads(8, head_dim)
        assert stored.token_bytes("bfloat16") / stored.token_bytes(name) >= least


def test_what_has_no_blocks_or_no_layout_is_refused_by_name():
    with pytest.raises(ConfigError, match="a scale for every 16 elements, and vectors of 72 are cached"):
        layout_of(Heads(2, 72), "k8v4", 16)
    assert layout_of(Heads(2, 72), "int8", 16).head_dim == 72
    with pytest.raises(ConfigError, match=r"'fp4_e2m1' has no layout of latents: choose from .*int8, fp8_e4m3"):
        layout_of(Latents(64, 16), "fp4_e2m1", 16)
