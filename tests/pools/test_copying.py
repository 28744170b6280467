"""Pages and their images: equal whatever the layout, the backend and the number of devices; no pool is copied."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootcellar.plan.stored import Heads, Latents, Routes, States
from rootcellar.pools import Pool, direct
from rootcellar.pools.copying import BLOCKS, Blocks, InPlace, copier, cut
from rootcellar.pools.images import Image, image_bytes
from rootcellar.pools.layouts import LAYOUTS, layout_of, tiled
from rootcellar.pools.layouts.layout import as_it_lies
from rootcellar.runner import CompileCounter

LAYERS, PAGES = 3, 24
STORED = {
    "heads": Heads(2, 16),
    "latents": Latents(24, 8),
    "states": States((3, 5), (4, 8, 5)),
    "routes": Routes(3, 2, 300),
}
NATIVE = pytest.param(InPlace, marks=pytest.mark.skipif(not direct.available(), reason="the copies were not built"))


@dataclass(frozen=True)
class Turned:
    """Keys and values by head in another order, as another backend might want them."""

    name: ClassVar[str] = "turned"
    form: ClassVar[str] = "heads"
    axes: ClassVar[tuple] = ((None, None, None, "kv_heads"),)
    image: ClassVar[tuple] = ((1, 2, 0, 3),)
    unfolded = property(as_it_lies)
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    page_size: int

    def buffers(self, pages):
        return (jax.ShapeDtypeStruct((pages, self.page_size, 2, self.kv_heads, self.head_dim), self.dtype),)


def fill(pool, seed=0):
    """Random bytes in every page but that of padding; a copy of them, by layer and array."""
    rng = np.random.default_rng(seed)
    kept = [
        tuple(rng.integers(0, 100, a.shape).astype(a.dtype) for a in pool.layout.buffers(pool.pages + 1))
        for _ in range(pool.layers)
    ]
    placed = zip(kept, [pool.shardings] * pool.layers, strict=True)
    pool.buffers = [tuple(map(jax.device_put, buffers, at)) for buffers, at in placed]
    return kept


def same(pool, kept, pages):
    return all(
        np.array_equal(np.asarray(a)[pages], b[pages])
        for buffers, others in zip(pool.buffers, kept, strict=True)
        for a, b in zip(buffers, others, strict=True)
    )


@pytest.mark.parametrize("form", ["heads", "latents"])
def test_what_a_cpu_wrote_down_is_read_in_tiles_of_a_tpu_and_the_other_way_round(form):
    """Pages as `native` and `xla` have them become those of the kernel for TPUs, and those the same images."""
    usual = layout_of(STORED[form], "bfloat16", 4)
    one, other, back = (Pool(layout, LAYERS, PAGES) for layout in (usual, tiled(usual), usual))
    assert one.layout != other.layout
    kept, pages = fill(one), np.array([3, 9, 4], np.int32)
    images = np.zeros((3, Image(one).nbytes), np.uint8)
    assert Image(other).nbytes == images.shape[1] == image_bytes(other.layout, LAYERS)
    copier(one).read(pages, images, np.arange(3))()
    theirs = copier(other)
    theirs.write(pages, theirs.fetch(images, np.arange(3)))()
    for buffers, others in zip(other.buffers, kept, strict=True):
        parts = zip(other.layout.read(buffers, pages), usual.read(others, pages), strict=True)
        assert all(np.array_equal(a, b) for a, b in parts)
    again = np.zeros_like(images)
    theirs.read(pages, again, np.arange(3))()
    np.testing.assert_array_equal(again, images)
    mine = copier(back)
    mine.write(pages, mine.fetch(again, np.arange(3)))()
    assert same(back, kept, pages)


@pytest.mark.parametrize("how", [Blocks, NATIVE])
@pytest.mark.parametrize(("form", "dtype"), sorted(LAYOUTS))
def test_pages_come_back_as_they_were(form, dtype, how):
    layout = layout_of(STORED[form], dtype, 4)
    pool = Pool(layout, LAYERS, PAGES)
    kept, copies = fill(pool), how(pool, Image(pool))
    images = np.zeros((PAGES, copies.image.nbytes), np.uint8)
    assert copies.image.nbytes == image_bytes(layout, LAYERS) == pool.nbytes // (PAGES + 1)
    rng = np.random.default_rng(1)
    pages, rows = rng.permutation(np.arange(1, PAGES + 1))[:21].astype(np.int32), rng.permutation(PAGES)[:21]
    copies.read(pages, images, rows)()
    untouched = np.setdiff1d(np.arange(PAGES), rows)
    assert not images[untouched].any()
    pool.free()
    pool.allocate()
    there = np.random.default_rng(2).permutation(np.arange(1, PAGES + 1))[:21].astype(np.int32)  # other pages
    copies.write(there, copies.fetch(images, rows))()
    moved = [tuple(np.zeros_like(a) for a in buffers) for buffers in kept]
    for buffers, others in zip(moved, kept, strict=True):
        for a, b in zip(buffers, others, strict=True):
            a[there] = b[pages]
    assert same(pool, moved, np.arange(1, PAGES + 1))


@pytest.mark.parametrize("how", [Blocks, NATIVE])
def test_an_image_is_array_by_array_layer_by_layer(how):
    pool = Pool(layout_of(STORED["states"], "bfloat16", 4), LAYERS, PAGES)
    kept, images = fill(pool), np.zeros((2, Image(pool).nbytes), np.uint8)
    how(pool, Image(pool)).read(np.array([5, 9], np.int32), images, np.array([1, 0]))()
    for row, page in ((1, 5), (0, 9)):
        expected = b"".join(kept[layer][array][page].tobytes() for array in range(2) for layer in range(LAYERS))
        assert images[row].tobytes() == expected


def test_images_do_not_depend_on_the_order_of_bytes_on_the_device():
    plain = Pool(layout_of(STORED["heads"], "float32", 4), LAYERS, PAGES)
    turned = Pool(Turned(2, 16, jnp.dtype(jnp.float32), 4), LAYERS, PAGES)
    kept = fill(plain)
    turned.buffers = [tuple(jnp.asarray(a.transpose(0, 3, 1, 2, 4)) for a in buffers) for buffers in kept]
    pages, rows = np.arange(1, PAGES + 1, dtype=np.int32), np.arange(PAGES)
    found = []
    for pool in (plain, turned):
        copies = copier(pool)
        assert isinstance(copies, InPlace) == (pool is plain and direct.available())
        images = np.zeros((PAGES, copies.image.nbytes), np.uint8)
        copies.read(pages, images, rows)()
        found.append(images)
    assert np.array_equal(*found)
    turned.free()
    turned.allocate()
    copies.write(pages, copies.fetch(found[0], rows))()
    assert same(turned, [tuple(a.transpose(0, 3, 1, 2, 4) for a in buffers) for buffers in kept], pages)


def test_images_do_not_depend_on_the_devices():
    """Heads split over two devices, and repeated for four: what each reads the others write back."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sharded_images.py")],
        env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == {"1", "2", "4", "4 whole"}
    assert len({each["images"] for each in found.values()}) == 1
    assert all(each["back"] for each in found.values()), found


@pytest.mark.parametrize("how", [Blocks, NATIVE])
@pytest.mark.parametrize("form", sorted(STORED))
def test_no_pool_is_copied(form, how):
    """What a copy needs beside its arguments and results does not grow with the pool; what is written is donated."""
    needed = []
    for pages in (8, 512):
        pool = Pool(layout_of(STORED[form], "float32", 4), LAYERS, pages)
        copies = how(pool, Image(pool))
        size = BLOCKS[-1] if how is InPlace else 1
        numbers = np.zeros(size, np.int32)
        if how is InPlace:
            addresses = np.zeros((size, 2), np.uint32)
            programs = (
                copies._read.lower(pool.buffers, numbers, addresses),
                copies._write.lower(pool.buffers, numbers, addresses),
            )
        else:
            images = np.zeros((1, copies.image.nbytes), np.uint8)
            new = copies.image.fetch(images, np.zeros(1, np.int64), 1)
            programs = copies.gather.lower(pool.buffers, numbers), copies.scatter.lower(pool.buffers, numbers, new)
        analyses = [program.compile().memory_analysis() for program in programs]
        assert analyses[1].alias_size_in_bytes == pool.nbytes
        needed.append([a.temp_size_in_bytes for a in analyses])
    assert needed[0] == needed[1]


@pytest.mark.parametrize("how", [Blocks, NATIVE])
def test_a_copy_is_of_the_moment_it_began(how):
    """What steps write after it began is not in it; and what it wrote is there for the next, without waiting."""
    pool = Pool(layout_of(STORED["latents"], "float32", 4), LAYERS, PAGES)
    kept, copies = fill(pool), how(pool, Image(pool))
    images = np.zeros((PAGES, copies.image.nbytes), np.uint8)
    pages, rows = np.arange(1, PAGES + 1, dtype=np.int32), np.arange(PAGES)
    step = jax.jit(lambda buffers: jax.tree.map(lambda a: a * 0 - 1, buffers), donate_argnums=0)
    wait = copies.read(pages, images, rows)
    pool.buffers = step(pool.buffers)
    wait()
    done = copies.write(pages, copies.fetch(images, rows))
    assert same(pool, kept, pages)
    done()


@pytest.mark.parametrize("how", [Blocks, NATIVE])
def test_what_was_compiled_ahead_is_not_compiled_again(how):
    pool = Pool(layout_of(STORED["states"], "float32", 4), LAYERS, 80)
    kept, copies = fill(pool), how(pool, Image(pool))
    copies.compile()
    assert same(pool, kept, np.arange(1, 81))
    compiles = CompileCounter()
    images, rows = np.zeros((80, copies.image.nbytes), np.uint8), np.arange(80)
    for count in (1, 3, 20, 80):
        pages = np.arange(1, count + 1, dtype=np.int32)
        copies.read(pages, images, rows[:count])()
        copies.write(pages, copies.fetch(images, rows[:count]))()
    assert compiles.count == 0
    assert same(pool, kept, np.arange(1, 81))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 33, 64, 65, 100, 200])
def test_blocks_are_few_and_at_least_half_full(count):
    blocks = list(cut(count))
    assert [start for start, *_ in blocks] == [0, *(stop for _, stop, _ in blocks[:-1])]
    assert blocks[-1][1] == count
    assert all(size in BLOCKS and size < 2 * (stop - start) for start, stop, size in blocks)
    assert len(blocks) <= 1 + count // 64 + 5
