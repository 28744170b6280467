"""Attention over paged latents against attention written out over contiguous ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.ops import kernels
from rootcellar.ops.backends import BACKENDS, INTERPRETED, Reach, attention, xla
from rootcellar.pools.layouts import PagedLatents

EACH = [
    pytest.param(name, marks=pytest.mark.skipif(name == "native" and kernels.built() is None, reason="not built"))
    for name in BACKENDS
    if name not in INTERPRETED  # which are interpreted, and slow: test_paged.py, test_paged_gpu.py
]


def reference(q, latents, position, reach):
    """One query [heads, d] over what it sees of latents [length, d], in float64: sums of latents."""
    first = max(0, position + 1 - reach.span) if reach.span else 0
    seen = latents[first : position + 1].astype(np.float64)
    scores = q.astype(np.float64) @ seen.T
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ seen


def make_case(rng, *, lengths, new, tile, page_size, heads, dim, dtype):
    """Rows of `lengths` tokens, of which the last `new` are in the batch; the others lie in the pool already."""
    need = [-(-n // page_size) for n in lengths]
    pages = rng.permutation(np.arange(1, sum(need) + 4))
    tables = np.zeros((len(lengths) + 1, max(need) + 2), np.int32)
    pool = np.full((sum(need) + 4, page_size, dim), np.nan, np.float32)
    pool[0] = 0
    latents = [np.asarray(rng.standard_normal((n, dim)).astype(dtype), np.float32) for n in lengths]
    taken = 0
    rows, positions, source = [], [], []
    for r, (length, fresh) in enumerate(zip(lengths, new, strict=True)):
        tables[r + 1, : need[r]] = pages[taken : taken + need[r]]
        taken += need[r]
        for t in range(length - fresh):
            pool[tables[r + 1, t // page_size], t % page_size] = latents[r][t]
        for start in range(length - fresh, length, tile):
            rows.append(r + 1)
            part = list(range(start, min(start + tile, length)))
            positions += part + [-1] * (tile - len(part))
            source += [(r, t) for t in part] + [None] * (tile - len(part))
    rows.append(0)  # a tile of padding
    positions += [-1] * tile
    source += [None] * tile
    q = rng.standard_normal((len(positions), heads, dim)).astype(np.float32) * dim**-0.5
    given = np.stack([np.ones(dim, np.float32) if s is None else latents[s[0]][s[1]] for s in source])
    batch = [jnp.asarray(x) for x in (q, given, tables, np.asarray(rows, np.int32), np.asarray(positions, np.int32))]
    return jnp.asarray(pool, dtype), batch, latents, source


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize(
    ("lengths", "new", "tile", "page_size", "heads", "dim", "dtype", "reach"),
    [
        ([700], [1], 1, 1, 4, 80, "float32", Reach()),
        ([1, 37, 300, 64], [1, 1, 1, 1], 1, 16, 4, 80, "float32", Reach()),
        ([1, 37, 300, 64], [1, 1, 1, 1], 1, 1, 16, 48, "bfloat16", Reach()),
        ([90, 33, 260], [90, 5, 100], 16, 1, 4, 80, "float32", Reach()),
        ([90, 33, 260], [90, 5, 100], 16, 16, 16, 48, "bfloat16", Reach()),
        ([90, 33, 600], [90, 5, 100], 16, 16, 4, 80, "float32", Reach("sliding_window", 40)),
    ],
    ids=lambda value: value.rule if isinstance(value, Reach) else None,
)
def test_matches_reference(backend, page_size, lengths, new, tile, heads, dim, dtype, reach):
    rng = np.random.default_rng(7)
    pool, batch, latents, source = make_case(
        rng, lengths=lengths, new=new, tile=tile, page_size=page_size, heads=heads, dim=dim, dtype=jnp.dtype(dtype)
    )
    layout = PagedLatents(dim, jnp.dtype(dtype), page_size)
    out, pool = jax.jit(attention(backend, layout, reach), donate_argnums=5)(*batch, pool)
    assert np.isfinite(np.asarray(pool[0], np.float32)).all()
    for i, s in enumerate(source):
        if s is not None:
            expected = reference(np.asarray(batch[0][i]), latents[s[0]], s[1], reach)
            np.testing.assert_allclose(out[i], expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize(("tiles", "tile"), [(1, 1), (2, 16)])
def test_step_memory_does_not_grow_with_the_pool(backend, tiles, tile):
    def temporary(pages):
        t = tiles * tile
        layout = PagedLatents(80, jnp.dtype(jnp.float32), 16)
        args = [((t, 4, 80), "f4"), ((t, 80), "f4")]
        args += [((3, 64), "i4"), ((tiles,), "i4"), ((t,), "i4")]
        shapes = [jax.ShapeDtypeStruct(s, d) for s, d in args]
        step = jax.jit(attention(backend, layout, Reach()), donate_argnums=5)
        return step.lower(*shapes, *layout.buffers(pages)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) <= temporary(256) + 4096


def test_writing_leaves_other_slots_alone():
    pool = jnp.arange(4 * 2 * 8, dtype=jnp.float32).reshape(4, 2, 8)
    tables = jnp.asarray([[0, 0], [3, 2]], jnp.int32)
    rows, positions = jnp.asarray([1], jnp.int32), jnp.asarray([2, -1], jnp.int32)
    layout = PagedLatents(8, jnp.dtype(jnp.float32), 2)
    (new,) = xla.write(layout, (pool,), (jnp.full((2, 8), -1.0),), tables, rows, positions)
    changed = np.argwhere(np.asarray(new != pool).any(-1))
    assert {tuple(c) for c in changed if c[0] != 0} == {(2, 0)}
    assert (np.asarray(new[2, 0]) == -1).all()
