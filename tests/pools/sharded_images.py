"""Run by test_copying.py in a process with four devices: the images of equal pages, however the heads lie.

> {how: {"images": digest, "back": whether pages come back from them} as JSON
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rootcellar.pools import Pool
from rootcellar.pools.copying import copier
from rootcellar.pools.layouts import PagedHeads

LAYERS, PAGES, HEADS = 2, 6, 2


def pool_over(devices, copies, split):
    layout = PagedHeads(HEADS * copies, 8, jnp.dtype(jnp.float32), 4)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    spec = PartitionSpec(None, None, "tensor") if split else PartitionSpec()
    return Pool(layout, LAYERS, PAGES, None if devices == 1 else (NamedSharding(mesh, spec),))


rng = np.random.default_rng(0)
kept = [rng.standard_normal((PAGES + 1, 2, HEADS, 4, 8)).astype(np.float32) for _ in range(LAYERS)]
pages, rows = np.array([6, 2, 5, 1, 3], np.int32), np.array([0, 4, 2, 3, 1])
found = {}
for how, devices, copies, split in (("1", 1, 1, False), ("2", 2, 1, True), ("4", 4, 2, True), ("4 whole", 4, 1, False)):
    pool = pool_over(devices, copies, split)
    wide = [array.repeat(copies, axis=2) for array in kept]
    pool.buffers = [(jax.device_put(array, pool.shardings[0]),) for array in wide]
    copying = copier(pool, copies)
    images = np.zeros((5, copying.image.nbytes), np.uint8)
    copying.read(pages, images, rows)()
    pool.free()
    pool.allocate()
    copying.write(pages, copying.fetch(images, rows))()
    back = all(np.array_equal(np.asarray(a)[pages], b[pages]) for (a,), b in zip(pool.buffers, wide, strict=True))
    placed = all(a.sharding.is_equivalent_to(pool.shardings[0], a.ndim) for (a,) in pool.buffers)
    found[how] = {"images": hashlib.sha256(images).hexdigest(), "back": back and placed}
json.dump(found, sys.stdout)
