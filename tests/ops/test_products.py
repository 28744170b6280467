"""Products over packed weights, however held, on every set of vectors that runs here, beside arithmetic written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.ops import kernels
from rootcellar.ops.panels import HOLDINGS, packer, rows, unpacked
from rootcellar.ops.products import MANY, product

# Inputs and outputs of a weight, and which axes are inputs: one axis, heads, parts of a projection, an embedding.
WEIGHTS = [((96, 60), (0,)), ((2, 32, 48), (0, 1)), ((288, 2, 3, 16), (0,)), ((57, 64), (1,))]
# By how much integers may be off, for weights of a normal distribution: half a step, and half of bfloat16's of it.
STEP = {"float32": 0.0, "bfloat16": 0.02, "w8": 0.02, "w4": 0.6}


def packed(holding, shape, inputs, seed=0, *, native, fixed=False):
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    how = packer(holding, shape, inputs)
    return weight, how.packed(how.pack(weight), native=native, fixed=fixed)


@pytest.mark.parametrize("holding", HOLDINGS)
@pytest.mark.parametrize(("shape", "inputs"), WEIGHTS, ids=str)
def test_what_is_packed_is_the_weight_to_half_a_step(holding, shape, inputs):
    weight, held = packed(holding, shape, inputs, native=False)
    how = packer(holding, shape, inputs)
    assert [(a.shape, a.dtype) for a in held.arrays] == how.shapes()
    np.testing.assert_allclose(unpacked(held), weight, rtol=0, atol=STEP[holding])
    if inputs == (1,):
        np.testing.assert_array_equal(rows(held, jnp.array([0, 56, 17])), unpacked(held)[jnp.array([0, 56, 17])])


def rounded(x, held):
    """By how much each sum may be off since rows that meet integers have 16 bits: half a step of each group, times all.

    ``x``: [tokens, *inputs].
    """
    inputs = held.inputs
    if not HOLDINGS[held.holding].grouped:
        return 0.0
    steps = np.abs(x).reshape(len(x), -1, held.group).max(axis=2) / 32767
    whole = np.moveaxis(np.asarray(unpacked(held), np.float64), inputs, range(len(inputs)))
    groups = whole.reshape(steps.shape[1], held.group, *whole.shape[len(inputs) :])
    if held.holding == "w4":  # the middle of 16 values meets the sum of a group's inputs, which is not rounded
        least, most = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
        groups = groups - least - (most - least) * 8 / 15
    return np.tensordot(0.501 * steps, np.abs(groups).sum(axis=1), 1)


@pytest.mark.parametrize("vectors", ["avx512vnni", "avx512", "avx2", "baseline"])
@pytest.mark.parametrize("holding", HOLDINGS)
@pytest.mark.parametrize(("shape", "inputs"), WEIGHTS, ids=str)
def test_kernels_multiply_as_written_out(holding, shape, inputs, vectors, monkeypatch):
    if not kernels.runs_vectors(vectors):
        pytest.skip(f"{vectors} does not run here")
    monkeypatch.setenv("ROOTCELLAR_VECTORS", vectors)
    _, held = packed(holding, shape, inputs, native=True)
    whole = np.asarray(unpacked(held), np.float64)
    rng = np.random.default_rng(1)
    for tokens in (1, 2, 3, 7, 125, MANY):
        x = rng.normal(size=(tokens, *(shape[i] for i in inputs))).astype(np.float32)
        axes = list(range(1, x.ndim)), list(inputs)
        wanted = np.tensordot(x, whole, axes)
        off = np.abs(product(x, held, inputs) - wanted)
        assert (off <= 2e-4 + rounded(x, held)).all()
        assert off.max() < 3e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("vectors", ["avx512vnni", "avx512", "avx2", "baseline"])
@pytest.mark.parametrize("holding", ["w8", "w4"])
def test_rows_that_meet_integers_may_hold_anything(holding, vectors, monkeypatch):
    """Nothing, or next to it, is nothing; what is not finite makes its own row so, and no other."""
    if not kernels.runs_vectors(vectors):
        pytest.skip(f"{vectors} does not run here")
    monkeypatch.setenv("ROOTCELLAR_VECTORS", vectors)
    _, held = packed(holding, (96, 60), (0,), native=True)
    for tokens in (6, 20):
        x = np.random.default_rng(4).normal(size=(tokens, 96)).astype(np.float32)
        x[0], x[1], x[2] = 0, 1e-38, x[2] * 1e30
        before = np.asarray(product(x, held))
        assert (before[0] == 0).all()
        assert (np.abs(before[1]) < 1e-30).all()
        assert np.isfinite(before).all()
        for value in (np.nan, np.inf, -np.inf):
            broken = x.copy()
            broken[4, 41] = value
            after = np.asarray(product(broken, held))
            assert not np.isfinite(after[4]).any()
            np.testing.assert_array_equal(np.delete(after, 4, 0), np.delete(before, 4, 0))


def test_many_threads_and_many_panels_give_the_same_as_few(monkeypatch):
    """So many outputs that the kernel takes all its threads; each sum is made by one of them, always in one order."""
    _, held = packed("w4", (256, 4096), (0,), native=True)
    x = np.random.default_rng(2).normal(size=(33, 256)).astype(np.float32)
    first = product(x, held)
    np.testing.assert_array_equal(first, product(x, held))
    off = np.abs(first - np.asarray(x, np.float64) @ np.asarray(unpacked(held), np.float64))
    assert (off <= 1e-4 + rounded(x, held)).all()


@pytest.mark.parametrize("vectors", ["avx512vnni", "avx512", "avx2", "baseline"])
@pytest.mark.parametrize("holding", HOLDINGS)
def test_where_the_order_is_fixed_a_row_gets_the_same_bits_in_any_company(holding, vectors, monkeypatch):
    if not kernels.runs_vectors(vectors):
        pytest.skip(f"{vectors} does not run here")
    monkeypatch.setenv("ROOTCELLAR_VECTORS", vectors)
    _, held = packed(holding, (288, 2, 60), (0,), native=True, fixed=True)
    x = np.random.default_rng(1).normal(size=(MANY + 8, 288)).astype(np.float32)
    alone = np.concatenate([product(x[i : i + 1], held) for i in range(16)])
    for tokens in (2, 3, 7, 16, 125, MANY, MANY + 8):
        np.testing.assert_array_equal(product(x[:tokens], held)[:16], alone[:tokens])


@pytest.mark.parametrize("vectors", ["avx512vnni", "avx512", "avx2", "baseline"])
def test_a_fixed_order_rounds_less_than_one_sum_after_another(vectors, monkeypatch):
    """A third of its error over 1,024 inputs; the form that anybody would write first is a chain of as many sums."""
    if not kernels.runs_vectors(vectors):
        pytest.skip(f"{vectors} does not run here")
    monkeypatch.setenv("ROOTCELLAR_VECTORS", vectors)
    weight, held = packed("float32", (1024, 64), (0,), native=True, fixed=True)
    x = np.random.default_rng(3).normal(size=(40, 1024)).astype(np.float32)
    true = x.astype(np.float64) @ weight.astype(np.float64)
    chain = np.cumsum(x[:, :, None] * weight, axis=1, dtype=np.float32)[:, -1]
    assert np.square(product(x, held) - true).mean() < np.square(chain - true).mean() / 9


def test_groups_of_equal_weights_divide_by_nothing():
    for holding in ("w8", "w4"):
        how = packer(holding, (64, 16), (0,))
        for value in (0.0, 0.5, -3.0):
            held = how.packed(how.pack(np.full((64, 16), value, np.float32)), native=False)
            np.testing.assert_allclose(unpacked(held), value, rtol=1 / 127)


@pytest.mark.parametrize(
    ("holding", "shape", "inputs"),
    [("w8", (36, 64), (0,)), ("bfloat16", (33, 64), (0,)), ("float32", (64, 5), (0,)), ("w4", (64, 64), ())],
)
def test_what_does_not_fit_panels_stays_as_it_is(holding, shape, inputs):
    assert packer(holding, shape, inputs) is None


def test_arrays_multiply_as_before():
    x = jnp.ones((3, 2, 8))
    assert product(x, jnp.ones((2, 8, 5)), (0, 1)).shape == (3, 5)
    wide = product(x[:, 0].astype(jnp.bfloat16), jnp.ones((7, 8), jnp.bfloat16), (1,), jnp.float32)
    assert (wide.shape, wide.dtype) == ((3, 7), jnp.float32)


def test_a_form_that_the_library_does_not_have_is_refused():
    if not kernels.runs_vectors(""):
        pytest.skip("no kernels here")
    _, held = packed("w8", (32, 16), (0,), native=True)
    wrong = jax.tree_util.tree_map(lambda a: a[..., :8], held)
    with pytest.raises(Exception, match="does not fit"):
        jax.block_until_ready(product(np.ones((1, 32), np.float32), wrong))
