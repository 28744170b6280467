"""Recurrent layers over packed batches, against the recurrence one token of one sequence after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.models.mixers.recurrent import IN_PLACE
from rootcellar.ops import delta, kernels
from rootcellar.ops.delta import gated_delta, gated_delta_sequential
from rootcellar.ops.recurrent import causal_conv, course, in_order
from rootcellar.ops.ssd import ssd, ssd_sequential
from rootcellar.ops.states import conv_in_states, in_states

IN_SLOTS = functools.partial(IN_PLACE["tpu"], interpret=True)
HEADS, WIDTH, SIZE, GROUPS, CHANNELS, TAPS = 4, 6, 5, 2, 3, 4


def pack(lengths, tile, padding):
    """Rows, positions (starting anywhere) and for each token its (row, index), None for padding."""
    rows, positions, source = [], [], []
    for r, length in enumerate(lengths):
        for start in range(0, length, tile):
            part = list(range(start, min(start + tile, length)))
            rows.append(r)
            positions += [40 + 7 * r + i for i in part] + [-1] * (tile - len(part))
            source += [(r, i) for i in part] + [None] * (tile - len(part))
    rows += [0] * padding
    positions += [-1] * (tile * padding)
    source += [None] * (tile * padding)
    return np.asarray(rows, np.int32), np.asarray(positions, np.int32), source


class Ssd:
    state = (HEADS, WIDTH, SIZE)
    in_place = None

    @classmethod
    def inputs(cls, rng, tokens):
        _, width, size = cls.state
        return {
            "x": rng.standard_normal((tokens, HEADS, width)),
            "dt": rng.uniform(0.01, 1.5, (tokens, HEADS)),
            "b": rng.standard_normal((tokens, GROUPS, size)),
            "c": rng.standard_normal((tokens, GROUPS, size)),
        }

    @staticmethod
    def _a():
        return -jnp.linspace(0.2, 3, HEADS, dtype=jnp.float32)

    @classmethod
    def packed(cls, pool, way, x, dt, b, c):
        return ssd(pool, x, dt, cls._a(), b, c, way, cls.in_place)

    @classmethod
    def sequential(cls, state, x, dt, b, c):
        return ssd_sequential(state, x, dt, cls._a(), b, c)


class Delta:
    state = (HEADS, SIZE, WIDTH)
    in_place = None

    @classmethod
    def inputs(cls, rng, tokens):
        _, size, width = cls.state
        return {
            "q": rng.standard_normal((tokens, GROUPS, size)),
            "k": rng.standard_normal((tokens, GROUPS, size)),
            "v": rng.standard_normal((tokens, HEADS, width)),
            "g": -rng.uniform(0.01, 1.5, (tokens, HEADS)),
            "beta": rng.uniform(0, 1, (tokens, HEADS)),
        }

    @classmethod
    def packed(cls, pool, way, q, k, v, g, beta):
        return gated_delta(pool, q, k, v, g, beta, way, cls.in_place)

    @staticmethod
    def sequential(state, q, k, v, g, beta):
        return gated_delta_sequential(state, q, k, v, g, beta)


class Conv:
    state = (TAPS - 1, CHANNELS)
    weight = np.random.default_rng(1).standard_normal((TAPS, CHANNELS)).astype(np.float32)
    bias = np.linspace(-1, 1, CHANNELS, dtype=np.float32)

    @classmethod
    def inputs(cls, rng, tokens):
        return {"x": rng.standard_normal((tokens, cls.state[1]))}

    in_place = None

    @classmethod
    def packed(cls, pool, way, x):
        return causal_conv(pool, x, cls.weight, cls.bias, way, cls.in_place)

    @classmethod
    def sequential(cls, state, x):
        whole = np.concatenate([state, x])
        y = [(whole[i : i + TAPS] * cls.weight).sum(0) + cls.bias for i in range(len(x))]
        return np.stack(y), whole[len(whole) - TAPS + 1 :]


class SsdInSlots(Ssd):
    in_place = IN_SLOTS


class DeltaInSlots(Delta):
    in_place = IN_SLOTS


class SsdInOrder(Ssd):
    in_place = in_order


class DeltaInOrder(Delta):
    in_place = in_order


class SsdNative(Ssd):
    state = (HEADS, 13, 83)  # tiles of rows, vectors of any width, and what fills neither
    in_place = in_states


class DeltaNative(Delta):
    state = (HEADS, 21, 203)
    in_place = in_states


class ConvNative(Conv):
    channels = 1037  # what two threads share, and does not fill vectors
    state = (TAPS - 1, channels)
    weight = np.random.default_rng(1).standard_normal((TAPS, channels)).astype(np.float32)
    bias = np.linspace(-1, 1, channels, dtype=np.float32)
    in_place = conv_in_states


class DeltaInOrderBehindSlots(Delta):
    in_place = functools.partial(in_order, first=IN_SLOTS)


OPS = [Ssd, Delta, Conv]
NATIVE = [SsdNative, DeltaNative, ConvNative]
IN_ORDER = [SsdInOrder, DeltaInOrder, DeltaInOrderBehindSlots, Conv]
BATCHES = [
    ([1], 1, 0),
    ([1, 1, 1], 1, 1),
    ([16], 16, 0),
    ([40, 3, 16, 17], 16, 2),
    ([5, 1, 2], 2, 3),  # a tile shorter than the convolution
]


@pytest.mark.parametrize(
    ("op", "lengths", "tile", "padding"),
    [(op, *batch) for op in OPS for batch in BATCHES] + [(op, *BATCHES[1]) for op in (SsdInSlots, DeltaInSlots)],
)
def test_a_packed_batch_equals_the_recurrence(op, lengths, tile, padding):
    verify_packed(op, lengths, tile, padding)


def verify_packed(op, lengths, tile, padding):
    rng = np.random.default_rng(len(lengths) * tile)
    rows, positions, source = pack(lengths, tile, padding)
    # The first row begins from zeros, the second reads a snapshot and writes elsewhere, the others have their own.
    slots = rng.permutation(np.arange(1, 2 * len(lengths) + 3))
    tables = np.zeros((len(rows), 2), np.int32)
    for r in range(len(lengths)):
        own = slots[2 * r]
        tables[r] = (0 if r == 0 else slots[2 * r + 1] if r == 1 else own), own
    pool = rng.standard_normal((2 * len(lengths) + 3, *op.state)).astype(np.float32)
    pool[0] = np.nan  # what padding wrote there
    inputs = [op.inputs(rng, n) for n in lengths]
    batch = {}
    for name, values in inputs[0].items():
        padding = np.full(values.shape[1:], np.nan)
        batch[name] = np.stack([padding if s is None else inputs[s[0]][name][s[1]] for s in source])
    step = jax.jit(
        lambda pool, tables, batch: op.packed(pool, course(tables, rows, positions), **batch), donate_argnums=0
    )
    y, new = step(jnp.asarray(pool), tables, {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()})
    written = set()
    for r, row in enumerate(inputs):
        read, own = tables[r]
        start = np.zeros(op.state, np.float32) if read == 0 else pool[read]
        expected, state = op.sequential(start, **{k: np.asarray(v, np.float32) for k, v in row.items()})
        got = np.stack([y[i] for i, s in enumerate(source) if s is not None and s[0] == r])
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(new[own], state, rtol=2e-4, atol=2e-5)
        written.add(int(own))
    for slot in set(range(1, len(pool))) - written:
        np.testing.assert_array_equal(new[slot], pool[slot])


FOLLOWING = [([1, 4, 1, 3], 7), ([6], 2), ([1, 1], 0)]


@pytest.mark.parametrize("op", IN_ORDER)
@pytest.mark.parametrize(("lengths", "padding"), FOLLOWING)
def test_a_token_that_follows_another_goes_on_from_its_state_and_leaves_its_own(op, lengths, padding):
    verify_following(op, lengths, padding)


def verify_following(op, lengths, padding):
    """``lengths``: tokens that follow each other, each in a tile and with a slot of its own."""
    rng = np.random.default_rng(sum(lengths))
    n = sum(lengths)
    slots = rng.permutation(np.arange(1, n + 4))
    owners = [(r, i) for r, length in enumerate(lengths) for i in range(length)]
    tables = np.zeros((n + padding, 2), np.int32)
    for t, (r, i) in enumerate(owners):  # the second begins from a snapshot, others from their own, the last from zeros
        source = 0 if r == len(lengths) - 1 else slots[-1] if r == 1 else slots[t]
        tables[t] = slots[t - 1] if i else source, slots[t]
    rows = np.asarray([*range(n), *[0] * padding], np.int32)
    positions = np.asarray([50 + i for _, i in owners] + [-1] * padding, np.int32)
    pool = rng.standard_normal((n + 4, *op.state)).astype(np.float32)
    pool[0] = np.nan
    inputs = [op.inputs(rng, length) for length in lengths]
    batch = {}
    for name, values in inputs[0].items():
        nothing = np.full((padding, *values.shape[1:]), np.nan)
        batch[name] = jnp.asarray(np.concatenate([*(row[name] for row in inputs), nothing]), jnp.float32)
    step = jax.jit(
        lambda pool, tables, batch: op.packed(pool, course(tables, rows, positions), **batch), donate_argnums=0
    )
    y, new = step(jnp.asarray(pool), tables, batch)
    for t, (r, i) in enumerate(owners):
        read = tables[t - i, 0]
        start = np.zeros(op.state, np.float32) if read == 0 else pool[read]
        so_far = {name: np.asarray(values[: i + 1], np.float32) for name, values in inputs[r].items()}
        expected, state = op.sequential(start, **so_far)
        np.testing.assert_allclose(y[t], expected[-1], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(new[tables[t, 1]], state, rtol=2e-4, atol=2e-5)
    for slot in set(range(1, len(pool))) - set(tables[:, 1].tolist()):
        np.testing.assert_array_equal(new[slot], pool[slot])


@pytest.mark.parametrize("vectors", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("op", NATIVE)
def test_the_kernel_takes_tokens_through_states_as_the_recurrence_says(op, vectors, monkeypatch):
    if not kernels.runs_vectors(vectors):
        pytest.skip(f"{vectors} does not run here")
    monkeypatch.setenv("ROOTCELLAR_VECTORS", vectors)
    for batch in BATCHES[:2]:
        verify_packed(op, *batch)
    for batch in FOLLOWING:
        verify_following(op, *batch)


@pytest.mark.skipif(not kernels.runs_vectors(""), reason="the kernels were not built")
@pytest.mark.parametrize("op", NATIVE)
def test_the_kernel_gives_a_row_the_same_bits_beside_others_and_works_in_the_pool(op):
    rng = np.random.default_rng(0)
    n = 9
    tables, pool = np.stack([np.arange(1, n + 1)] * 2, 1).astype(np.int32), rng.standard_normal((n + 1, *op.state))
    batch = {name: jnp.asarray(values, jnp.float32) for name, values in op.inputs(rng, n).items()}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, tables, batch):
        rows = jnp.arange(len(tables), dtype=jnp.int32)
        return op.packed(pool, course(tables, rows, jnp.full(len(tables), 7)), **batch)

    y, together = step(jnp.asarray(pool, jnp.float32), tables, batch)
    alone = jnp.asarray(pool, jnp.float32)
    where = alone.unsafe_buffer_pointer()
    for i in range(n):
        own = {name: values[i : i + 1] for name, values in batch.items()}
        y_alone, alone = step(alone, tables[i : i + 1], own)
        np.testing.assert_array_equal(y_alone[0], y[i])
    np.testing.assert_array_equal(alone, together)
    assert alone.unsafe_buffer_pointer() == where


@pytest.mark.parametrize("op", OPS)
def test_a_step_calls_nothing_that_waits_for_the_threads_it_runs_on(op):
    """As JAX's kernels over LAPACK do on CPUs: once every thread is in one, the steps of several devices never end."""
    tiles, tile = 4, 16
    batch = {
        name: jax.ShapeDtypeStruct(v.shape, jnp.float32)
        for name, v in op.inputs(np.random.default_rng(0), tiles * tile).items()
    }
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((tiles, 2), (tiles,), (tiles * tile,))]
    pool = jax.ShapeDtypeStruct((8, *op.state), jnp.float32)
    step = jax.jit(
        lambda pool, tables, rows, positions, batch: op.packed(pool, course(tables, rows, positions), **batch)
    )
    assert "lapack" not in step.lower(pool, *ints, batch).compile().as_text()


@pytest.mark.parametrize("keys", ["alike", "apart"])
def test_what_a_tile_writes_solves_its_system_on_any_kind_of_device(keys):
    """``alike``: one key again and again, whose powers grow beyond what float32 tells apart."""
    rng = np.random.default_rng(0)
    for tile in (1, 2, 5, 16, 64):
        k = rng.standard_normal((3, tile, 8)) if keys == "apart" else np.ones((3, tile, 8))
        k /= np.linalg.norm(k, axis=2, keepdims=True)
        system, sides = (k @ k.swapaxes(1, 2)).astype(np.float32), rng.standard_normal((3, tile, 7)).astype(np.float32)
        expected = np.linalg.solve(np.tril(system.astype(float), -1) + np.eye(tile), sides)
        for solved in (delta._solved, delta._solved_by_products):
            np.testing.assert_allclose(solved(system, sides), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "tiles", "tile"),
    [(op, *shape) for op in OPS for shape in ((1, 1), (4, 1), (4, 16))]
    + [(op, tiles, 1) for op in (SsdInOrder, DeltaInOrder) for tiles in (1, 4)],
)
def test_step_memory_does_not_grow_with_the_pool(op, tiles, tile):
    """The trap of XLA on CPUs: a pool that is read and written in one step may be copied in every one."""
    tokens = tiles * tile
    batch = {
        k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in op.inputs(np.random.default_rng(0), tokens).items()
    }
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((tiles, 2), (tiles,), (tokens,))]

    def temporary(slots):
        def step(pool, tables, rows, positions, batch):
            return op.packed(pool, course(tables, rows, positions), **batch)

        pool = jax.ShapeDtypeStruct((slots, *op.state), jnp.float32)
        compiled = jax.jit(step, donate_argnums=0).lower(pool, *ints, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) <= temporary(64) + 4096
