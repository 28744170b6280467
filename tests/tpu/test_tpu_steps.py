"""Steps of each family at full size, compiled for TPUs that are not here (``make test-tpu-compile``).

``ROOTCELLAR_TPU_CASES``: "ci" (those that differ most) or "all". A table of what was found is printed at the end.
"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from compiled_steps import PAGE, Case, parse
from full_size import model_of

from rootcellar.engine.memory import estimate_reserve
from rootcellar.models.places import device_bytes
from rootcellar.pools.copying import BLOCKS, Blocks
from rootcellar.pools.images import Image, image_bytes
from rootcellar.pools.layouts import page_bytes
from rootcellar.pools.pool import _allocator
from rootcellar.runner.reserve import weight_bytes

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make test-tpu-compile"
    ),
]

CI = {
    "qwen2.5-3b-v5e-tp4": (1, 16),
    "llama-4-scout-v5p-tp4": (1,),
}
ALL = [
    ("qwen2.5-3b", "v5e", 1), ("qwen2.5-3b", "v5e", 4), ("qwen2.5-3b", "v6e", 1), ("qwen2.5-3b", "v5p", 2),
    ("llama-3-8b", "v5e", 8), ("llama-3-8b", "v6e", 1), ("llama-3-8b", "v5p", 1),
    ("gemma-3-27b", "v5e", 8), ("gemma-3-27b", "v6e", 4), ("gemma-3-27b", "v5p", 2),
    ("gpt-oss-120b", "v6e", 8), ("gpt-oss-120b", "v5p", 8),
    ("deepseek-v3", "v6e", 8), ("deepseek-v3", "v5p", 8),
    ("llama-4-scout", "v6e", 8), ("llama-4-scout", "v5p", 4),
    ("bamba-9b", "v6e", 1), ("bamba-9b", "v5p", 1),
    ("qwen3-next-80b", "v6e", 8), ("qwen3-next-80b", "v5p", 2),
]  # fmt: skip
MOST = 1.5
"""Bytes that decoding moves for each of the least."""
WANTED = os.environ.get("ROOTCELLAR_TPU_CASES", "ci")
TABLE: list[dict] = []


def case_of(name):
    model, chip, tp = name.rsplit("-", 2)
    return Case(model, chip, int(tp.removeprefix("tp")))


def steps():
    if WANTED == "ci":
        return [(case_of(name), tile) for name, tiles in CI.items() for tile in tiles]
    return [(Case(*each), tile) for each in ALL for tile in (1, 16)]


@pytest.fixture(scope="module", autouse=True)
def table():
    """What was seen, for docs/accelerators.md."""
    yield
    head = "| model, chip, devices | step | aliased | temporaries | moved | least | ratio | XLA's count |"
    print("", head, "|---|---|---|---|---|---|---|---|", *map(written, TABLE), sep="\n")


def written(row):
    def mega(name):
        return f"{row[name] / 1e6:,.1f}" if name in row else ""

    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    words = [row["case"], row["step"], *map(mega, ("aliased", "temporaries", "moved", "least")), ratio, mega("xla")]
    return f"| {' | '.join(words)} |"


def planned_pools(case):
    """Bytes on a device of each pool, as the planner counts: the layers' bytes of a token, or of a request.

    A planner knows no tiles; what fills up a row of latents is counted here.
    """
    _, architecture = model_of(case.model)
    groups = {(g.kind.rule, g.kind.span): g.stored for g in architecture.groups}
    paging = case.programs.paging
    planned = {}
    for kind in paging.kinds:
        pool = paging.pool_of[kind.name]
        stored = groups[kind.rule, kind.span]
        page = PAGE * stored.token_bytes("bfloat16", case.tp) + stored.request_bytes("bfloat16")
        layout, layers = paging.pools[pool]
        filled = page_bytes(layout) / image_bytes(layout, 1)
        planned[pool] = (case.pages[pool] + 1) * page * layers * filled
    return planned


@pytest.mark.parametrize(("case", "tile"), [pytest.param(*s, id=f"{s[0]}-{s[1]}") for s in steps()])
def test_a_step_compiles_and_copies_nothing_it_need_not(case, tile):
    step = case.compile(tile)
    TABLE.append(step.row())
    memory, sizes = step.memory, step.sizes
    pools = sum(sizes["pools"])
    assert pools == sum(planned_pools(case).values())
    # Inputs of convolutions, three of each channel, are filled up to a tile.
    assert pools <= memory.alias_size_in_bytes <= pools * (1.001 if "recurrent" in case.pages else 1)
    given = memory.argument_size_in_bytes - memory.alias_size_in_bytes - sum(sizes["weights"])
    _, _, *batch = case.arguments(tile)
    told = sum(map(device_bytes, jax.tree.leaves(batch)))
    edges = 2**20 + sum(sizes["weights"]) // 1000  # of tiles
    assert told <= given <= 2 * told + edges, "weights and pools are what arguments take"
    assert sum(sizes["weights"]) == weight_bytes(case.programs.placement, jnp.bfloat16)
    assert step.copies_of_pools() == []
    assert step.gathers() == []
    assert memory.temp_size_in_bytes <= estimate_reserve(case.programs), "engines set as much aside"
    if tile == 1:
        assert sum(n for _, n in step.moved) <= MOST * step.least


@pytest.fixture(scope="module")
def pool():
    """As much of a pool as its copiers know, on four chips, and its buffers as shapes."""
    case = Case("qwen2.5-3b", "v5e", 4)
    placement = case.programs.placement
    ((name, (layout, layers)),) = case.programs.paging.pools.items()
    shardings = placement.pool_shardings(layout)
    return SimpleNamespace(
        layout=layout, layers=layers, shardings=shardings, buffers=case.arguments(1)[1][name], whole=placement.whole
    )


def compiled(function, *arguments):
    program = function.lower(*arguments).compile()
    return program.memory_analysis(), parse(program.as_text())


def test_dropping_and_making_pools_anew_takes_their_bytes_and_no_more(pool):
    (buffer,) = pool.buffers[0]
    memory, _ = compiled(_allocator(buffer.shape, buffer.dtype, buffer.sharding))
    assert memory.output_size_in_bytes == device_bytes(buffer)
    assert memory.temp_size_in_bytes < 2**20


def test_copies_of_pages_take_the_pages_and_not_the_pool(pool):
    copier, pages = Blocks(pool, Image(pool, copies=2)), BLOCKS[-1]
    numbers = jax.ShapeDtypeStruct((pages,), jnp.int32, sharding=pool.whole)
    blocks = pages * sum(device_bytes(b) // b.shape[0] for (b,) in pool.buffers)
    memory, _ = compiled(copier.gather, pool.buffers, numbers)
    assert memory.output_size_in_bytes == pytest.approx(blocks, rel=0.01)
    assert memory.temp_size_in_bytes < 2 * blocks
    (piece,) = copier.image.pieces
    shape = (pages, *(piece.shape[axis] * (2 if axis == piece.heads else 1) for axis in range(len(piece.shape))))
    image = jax.ShapeDtypeStruct(shape, piece.dtype, sharding=piece.sharding)
    memory, _ = compiled(copier.scatter, pool.buffers, numbers, [[image]] * pool.layers)
    assert memory.alias_size_in_bytes == sum(device_bytes(b) for (b,) in pool.buffers)
    assert memory.temp_size_in_bytes < 2 * blocks
