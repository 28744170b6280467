"""The attention backends against attention written out over contiguous keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pairs import combinations
from rootcellar.compiled import open_library
from rootcellar.errors import ConfigError
from rootcellar.ops import kernels
from rootcellar.ops.backends import BACKENDS, INTERPRETED, Reach, attention, choose_backend, xla
from rootcellar.plan.stored import Heads, Latents
from rootcellar.pools.layouts import PagedHeads, layout_of

NATIVE = kernels.built() is not None
NATIVE_ONLY = pytest.mark.skipif(not NATIVE, reason="built without a compiler")
# The one for TPUs is interpreted, and slow: test_paged.py.
EACH = [
    pytest.param(name, marks=NATIVE_ONLY if name == "native" else []) for name in BACKENDS if name not in INTERPRETED
]


def on_both(*axes):
    """Each combination is half a second of compiling or more: by day those in which all pairs meet."""
    params = []
    for by_day, values in combinations(*axes):
        at_night = [] if by_day else [pytest.mark.long]
        params.append(pytest.param("native", *values, marks=[NATIVE_ONLY, *at_night]))
        params.append(pytest.param("xla", *values, marks=at_night))
    return params


def reference(q, keys, values, position, reach=None, sinks=None):
    """One query [heads, d] over what it sees of keys, values [length, kv_heads, d], in float64."""
    group = q.shape[0] // keys.shape[1]
    reach = reach or Reach(scale=q.shape[1] ** -0.5)
    seen = [p for p in range(position + 1) if sees(reach, position, p)]
    out = np.empty(q.shape)
    for head in range(q.shape[0]):
        k = keys[seen, head // group].astype(np.float64)
        scores = k @ q[head] * reach.scale
        w = np.exp(reach.softcap * np.tanh(scores / reach.softcap) if reach.softcap else scores)
        sink = 0.0 if sinks is None else np.exp(float(sinks[head]))
        out[head] = (w / (w.sum() + sink)) @ values[seen, head // group]
    return out


def sees(reach, query, key):
    """The rules in words: the last ``span`` tokens, itself included; those of its own chunk; all."""
    if reach.rule == "sliding_window":
        return query - key < reach.span
    return reach.rule == "full" or query // reach.span == key // reach.span


def make_case(rng, *, lengths, new, tile, page_size, kv_heads, group, head_dim, dtype, reach=None):
    """Rows of `lengths` tokens, of which the last `new` are in the batch; the others lie in the pool already."""
    width = -(-max(lengths) // page_size) + 2
    need = [-(-n // page_size) for n in lengths]
    pages = rng.permutation(np.arange(1, sum(need) + 4))
    tables = np.zeros((len(lengths) + 1, width), np.int32)
    pool = np.full((sum(need) + 5, 2, kv_heads, page_size, head_dim), np.nan, np.float32)
    pool[0] = 0
    keys = [rng.standard_normal((n, kv_heads, head_dim)).astype(np.float32) for n in lengths]
    values = [rng.standard_normal((n, kv_heads, head_dim)).astype(np.float32) for n in lengths]
    if dtype == "bfloat16":
        keys = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in keys]
        values = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in values]
    taken = 0
    rows, positions, source = [], [], []
    for r, (length, fresh) in enumerate(zip(lengths, new, strict=True)):
        tables[r + 1, : need[r]] = pages[taken : taken + need[r]]
        taken += need[r]
        for t in range(length - fresh):
            pool[tables[r + 1, t // page_size], 0, :, t % page_size] = keys[r][t]
            pool[tables[r + 1, t // page_size], 1, :, t % page_size] = values[r][t]
        if reach is not None:  # pages that no query sees are somebody else's, and hold what ruins every sum
            gone = next(p for p in range(length) if sees(reach, length - fresh, p)) // page_size
            tables[r + 1, :gone] = len(pool) - 1
        for start in range(length - fresh, length, tile):
            rows.append(r + 1)
            part = list(range(start, min(start + tile, length)))
            positions += part + [-1] * (tile - len(part))
            source += [(r, t) for t in part] + [None] * (tile - len(part))
    rows.append(0)  # a tile of padding
    positions += [-1] * tile
    source += [None] * tile
    q = rng.standard_normal((len(positions), kv_heads * group, head_dim)).astype(np.float32)
    k = np.stack([np.ones((kv_heads, head_dim), np.float32) if s is None else keys[s[0]][s[1]] for s in source])
    v = np.stack([np.ones((kv_heads, head_dim), np.float32) if s is None else values[s[0]][s[1]] for s in source])
    # Unwritten slots hold NaN: what an earlier owner left must not matter.
    batch = [jnp.asarray(x) for x in (q, k, v, tables, np.asarray(rows, np.int32), np.asarray(positions, np.int32))]
    return pool, batch, keys, values, source


@pytest.mark.parametrize(
    ("backend", "page_size", "lengths", "new", "tile", "kv_heads", "group", "head_dim", "dtype"),
    on_both(
        [(1,), (16,), (64,)],
        [
            ([700], [1], 1),  # one row: the native backend splits the context
            ([1, 37, 300, 64, 16], [1, 1, 1, 1, 1], 1),
            ([90, 33, 260], [90, 5, 100], 16),
            ([640], [64], 16),
        ],
        [(2, 3, 32, "float32"), (4, 1, 128, "float32"), (1, 6, 64, "bfloat16")],
    ),
)
def test_matches_reference(backend, page_size, lengths, new, tile, kv_heads, group, head_dim, dtype):
    rng = np.random.default_rng(7)
    pool, batch, keys, values, source = make_case(
        rng, lengths=lengths, new=new, tile=tile, page_size=page_size, kv_heads=kv_heads, group=group,
        head_dim=head_dim, dtype=dtype,
    )  # fmt: skip
    layout = PagedHeads(kv_heads, head_dim, jnp.dtype(dtype), page_size)
    step = jax.jit(attention(backend, layout, Reach(scale=head_dim**-0.5)), donate_argnums=7)
    q, k, v, *where = batch
    out, pool = step(q, k, v, jnp.full(q.shape[1], -jnp.inf), *where, jnp.asarray(pool, dtype))
    assert np.isfinite(np.asarray(pool[0], np.float32)).all()
    for i, s in enumerate(source):
        if s is not None:
            expected = reference(np.asarray(batch[0][i]), keys[s[0]], values[s[0]], s[1])
            np.testing.assert_allclose(out[i], expected, atol=2e-6, rtol=2e-5)


@NATIVE_ONLY
@pytest.mark.parametrize("vectors", ["avx512", "avx2", "baseline"])
def test_each_instruction_set_matches_reference(vectors, monkeypatch):
    """Forced, where this processor has it: decoding and prefill, with sizes that leave a part of a register over."""
    if not kernels.runs_vectors(vectors):
        pytest.skip(f"this processor does not have {vectors}")
    monkeypatch.setenv("ROOTCELLAR_VECTORS", vectors)
    for lengths, new, tile, (kv_heads, group, head_dim, dtype), reach in (
        ([700, 37, 1], [1, 1, 1], 1, (1, 5, 48, "float32"), Reach("sliding_window", 300, 0.2, softcap=1.5)),
        ([300, 64, 260], [100, 64, 5], 16, (2, 3, 80, "bfloat16"), Reach("chunked_local", 96, 0.1)),
        ([150], [150], 16, (1, 2, 16, "float32"), Reach(scale=0.25, softcap=0.75)),
    ):
        rng = np.random.default_rng(3)
        pool, batch, keys, values, source = make_case(
            rng, lengths=lengths, new=new, tile=tile, page_size=16, kv_heads=kv_heads, group=group, head_dim=head_dim,
            dtype=dtype, reach=reach,
        )  # fmt: skip
        layout = PagedHeads(kv_heads, head_dim, jnp.dtype(dtype), 16)
        q, k, v, *where = batch
        sinks = rng.normal(0, 2, kv_heads * group).astype(np.float32)
        step = jax.jit(attention("native", layout, reach), donate_argnums=7)
        out, pool = step(q, k, v, jnp.asarray(sinks), *where, jnp.asarray(pool, dtype))
        for i, s in enumerate(source):
            if s is not None:
                expected = reference(np.asarray(q[i]), keys[s[0]], values[s[0]], s[1], reach, sinks)
                np.testing.assert_allclose(out[i], expected, atol=3e-6, rtol=3e-5)


@NATIVE_ONLY
def test_an_instruction_set_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("ROOTCELLAR_VECTORS", "mmx")
    with pytest.raises(ConfigError, match="ROOTCELLAR_VECTORS='mmx'"):
        choose_backend("native", [by_head(64)], "cpu")
    assert choose_backend("auto", [by_head(64)], "cpu") == "xla"


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize(
    ("reach", "tiles", "tile"),
    [
        (Reach(), 1, 1),
        (Reach("sliding_window", 128), 4, 1),
        (Reach(), 2, 16),
        pytest.param(Reach(), 4, 1, marks=pytest.mark.long),
        pytest.param(Reach("sliding_window", 128), 1, 1, marks=pytest.mark.long),
        pytest.param(Reach("sliding_window", 128), 2, 16, marks=pytest.mark.long),
    ],
    ids=lambda value: value.rule if isinstance(value, Reach) else None,
)
def test_step_memory_does_not_grow_with_the_pool(backend, reach, tiles, tile):
    """The trap of XLA on CPUs: a pool that is scattered to and gathered from may be copied in every step."""

    def temporary(pages):
        layout = PagedHeads(2, 64, jnp.dtype(jnp.float32), 16)
        t = tiles * tile
        args = [((t, 4, 64), "f4"), ((t, 2, 64), "f4"), ((t, 2, 64), "f4")]
        args += [((4,), "f4"), ((3, 64), "i4"), ((tiles,), "i4"), ((t,), "i4")]
        shapes = [jax.ShapeDtypeStruct(s, d) for s, d in args]
        step = jax.jit(attention(backend, layout, reach), donate_argnums=7)
        return step.lower(*shapes, *layout.buffers(pages)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) <= temporary(256) + 4096


@pytest.mark.parametrize(
    ("backend", "page_size", "lengths", "new", "tile", "rule", "span", "sink"),
    on_both(
        [(1,), (16,)],
        [([1500], [1], 1), ([1, 37, 300, 64, 129], [1, 1, 1, 1, 1], 1), ([90, 33, 420], [90, 5, 200], 16)],
        [
            ("sliding_window", 1, False),
            ("sliding_window", 24, True),
            ("sliding_window", 600, False),
            ("chunked_local", 64, True),
            ("full", 0, True),
        ],
    ),
)
def test_windows_chunks_and_sinks_match_reference(backend, page_size, lengths, new, tile, rule, span, sink):
    rng = np.random.default_rng(11)
    reach = Reach(rule, span, scale=0.3)
    pool, batch, keys, values, source = make_case(
        rng, lengths=lengths, new=new, tile=tile, page_size=page_size, kv_heads=2, group=2, head_dim=32,
        dtype="float32", reach=reach,
    )  # fmt: skip
    sinks = rng.normal(0, 2, 4).astype(np.float32) if sink else np.full(4, -np.inf, np.float32)
    q, k, v, *where = batch
    layout = PagedHeads(2, 32, jnp.dtype(jnp.float32), page_size)
    step = jax.jit(attention(backend, layout, reach), donate_argnums=7)
    out, pool = step(q, k, v, jnp.asarray(sinks), *where, jnp.asarray(pool))
    for i, s in enumerate(source):
        if s is not None:
            expected = reference(np.asarray(q[i]), keys[s[0]], values[s[0]], s[1], reach, sinks)
            np.testing.assert_allclose(out[i], expected, atol=3e-6, rtol=3e-5)


def test_writing_leaves_other_slots_alone():
    layout = PagedHeads(1, 16, jnp.dtype(jnp.float32), 2)
    pool = jnp.arange(4 * 2 * 1 * 2 * 16, dtype=jnp.float32).reshape(4, 2, 1, 2, 16)
    k = jnp.full((2, 1, 16), -1.0)
    tables = jnp.asarray([[0, 0], [3, 2]], jnp.int32)
    rows, positions = jnp.asarray([1], jnp.int32), jnp.asarray([2, -1], jnp.int32)
    (new,) = xla.write(layout, (pool,), (k, k - 1), tables, rows, positions)
    changed = np.argwhere(np.asarray(new != pool).any(-1))
    assert {tuple(c) for c in changed if c[0] != 0} == {(2, 0, 0, 0), (2, 1, 0, 0)}
    assert float(new[2, 1, 0, 0, 0]) == -2.0


def by_head(head_dim, dtype="float32"):
    return layout_of(Heads(2, head_dim), dtype, 16)


def test_native_backend_that_cannot_run_says_why():
    with pytest.raises(ConfigError, match="float16"):
        choose_backend("native", [by_head(64, "float16")], "cpu")
    with pytest.raises(ConfigError, match=r"gpu.*Use attention_backend='auto' or 'tpu' or 'xla' or 'gpu'"):
        choose_backend("native", [by_head(64)], "gpu")
    with pytest.raises(ConfigError, match="rows of 72 elements, only for multiples of 16" if NATIVE else "compiler"):
        choose_backend("native", [layout_of(Latents(64, 8), "float32", 16)], "cpu")
    assert choose_backend("auto", [layout_of(Latents(64, 8), "float32", 16)], "cpu") == "xla"
    assert choose_backend("auto", [by_head(64)], "gpu") == "xla"
    assert choose_backend("auto", [by_head(64), by_head(7)], "cpu") == "xla"
    assert choose_backend("auto", [by_head(64)], "cpu") == ("native" if NATIVE else "xla")


def test_a_library_of_other_sources_says_that_it_must_be_built_again(tmp_path):
    """Any shared library will do, as one that lacks what these sources call."""
    (tmp_path / "_native.so").symlink_to(np._core._multiarray_umath.__file__)
    for targets, functions in (({"a_call": "RootcellarOther"}, []), ({}, ["RootcellarOther"])):
        with pytest.raises(ConfigError, match=r"_native.so is not .*RootcellarOther.*build rootcellar again"):
            open_library([str(tmp_path)], "_native.so", targets, "nothing happens", functions)
