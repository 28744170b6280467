"""The largest of rows of scores and what all weigh, on every set of vectors that runs here, beside double precision."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.ops import kernels
from rootcellar.ops.peaks import _by_xla, _native, peaks

STRANGE = [np.nan, np.inf, -np.inf, -1e30, 3e38, -3e38]


def scores_of(seed, rows, n, strange=0):
    rng = np.random.default_rng(seed)
    scores = (np.round(rng.normal(size=(rows, n)) * 320) / 64).astype(np.float32)  # so that some are the same
    for _ in range(strange):
        scores[rng.integers(rows), rng.integers(n)] = rng.choice(STRANGE)
    return scores


def verify(found, scores):
    at, top, mass = jax.device_get(found)
    assert (at.dtype, top.dtype, mass.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_array_equal(at, np.argmax(scores, axis=1))
    np.testing.assert_array_equal(top, scores[np.arange(len(scores)), at])
    wide = scores[np.isfinite(top)].astype(np.float64)
    expected = np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)
    np.testing.assert_allclose(mass[np.isfinite(top)], expected, rtol=1e-6)
    assert np.isnan(mass[~np.isfinite(top)]).all()


@pytest.mark.parametrize("vectors", ["avx512vnni", "avx512", "avx2", "baseline", "xla"])
def test_peaks_are_those_of_double_precision(vectors, monkeypatch):
    if vectors != "xla" and not kernels.runs_vectors(vectors):
        pytest.skip(f"{vectors} does not run here")
    monkeypatch.setenv("ROOTCELLAR_VECTORS", "" if vectors == "xla" else vectors)

    @jax.jit
    def find(scores):
        return (_by_xla if vectors == "xla" else _native)(scores)

    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        rows=st.sampled_from([1, 3, 16]),
        n=st.sampled_from([1, 15, 64, 1031, 4096]),
        strange=st.integers(0, 4),
    )
    def holds(seed, rows, n, strange):
        scores = scores_of(seed, rows, n, strange)
        verify(find(scores), scores)

    holds()


@pytest.mark.skipif(not kernels.runs_vectors(""), reason="the kernels were not built")
def test_cpus_take_the_kernel_and_a_row_s_bits_are_the_same_beside_others():
    scores = scores_of(0, 16, 5000)
    assert "rootcellar_peaks" in jax.jit(peaks).lower(scores).as_text()
    together, alone = jax.jit(peaks)(scores), [jax.jit(peaks)(scores[i : i + 1]) for i in range(16)]
    for name in ("at", "top", "mass"):
        np.testing.assert_array_equal(getattr(together, name), [getattr(each, name)[0] for each in alone])
    verify(together, scores)
