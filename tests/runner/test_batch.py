"""Packed batches: every token once, at its place, padding harmless."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rootcellar.runner import Batch, BatchPart, Shapes


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    tile=st.sampled_from([1, 4, 16]),
    start=st.integers(0, 50),
)
def test_every_token_lies_once_in_a_tile_of_its_row(lengths, tile, start):
    tables = {"full": np.arange(40, dtype=np.int32).reshape(10, 4)}
    parts = [BatchPart(i + 1, start + i, np.arange(n) + 100 * i) for i, n in enumerate(lengths)]
    batch = Batch.build(parts, tables, tile)
    tiles = len(batch.rows)
    assert tiles & (tiles - 1) == 0
    assert len(batch.tokens) == len(batch.positions) == tiles * tile
    found = {}
    for t, position in enumerate(batch.positions):
        if position >= 0:
            found.setdefault(int(batch.rows[t // tile]), []).append((int(position), int(batch.tokens[t])))
    expected = {i: [(p.start + j, int(x)) for j, x in enumerate(p.tokens)] for i, p in enumerate(parts)}
    assert found == expected
    for i, part in enumerate(parts):
        assert batch.tokens[batch.last[i]] == part.tokens[-1]
        assert batch.positions[batch.last[i]] == part.start + len(part.tokens) - 1
        np.testing.assert_array_equal(batch.tables["full"][i], tables["full"][part.row])
        assert batch.tokens[batch.starts[i]] == part.tokens[0]


@given(chunk=st.integers(1, 600), running=st.integers(1, 80))
def test_shapes_hold_what_the_scheduler_may_plan(chunk, running):
    shapes = Shapes.of(chunk, running)
    assert shapes.tile & (shapes.tile - 1) == 0
    assert shapes.tile <= chunk
    assert shapes.prefill_tiles * shapes.tile >= chunk
    sizes = {s for s in shapes.all() if s[1] == 1}
    assert max(n for n, _ in sizes) >= running
    assert max(n for n, tile in shapes.all() if tile == shapes.tile) >= shapes.prefill_tiles
