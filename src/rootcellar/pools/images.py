"""What a page looks like away from the device: its *image*, all the bytes of one page of one pool in one block.

Array by array of the layout, layer by layer, in an order of axes that depends on what is stored, the page size and the
type alone: not on the attention backend, and not on how many devices share the heads, or whether heads are repeated
there. So a page that one engine wrote down another can read.

Images lie in the rows of an array uint8 ``[rows, nbytes]``; where is its owner's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from numpy.typing import NDArray

from rootcellar.pools.layouts import Layout
from rootcellar.pools.pool import Pool

Images = NDArray[np.uint8]
Rows = NDArray[np.integer]


@dataclass(frozen=True)
class Piece:
    """One array of a layout, as it is in an image.

    Attributes:
        shape: of one layer of a page in the image, and ``dtype`` its type.
        lies: the shape of a page on the device, and ``unfolded`` that whose axes the image orders.
        order: the unfolded axes of a page in the image's order.
        heads: which axis of ``shape`` is the KV heads'; None where there are none.
        offset, nbytes: where the first layer begins in the image, and the bytes of each.
        sharding: of pages in the image's order of axes, as they go to the device.
        gathered: of those that come from it: the same, or whole everywhere where each process has only a part.
    """

    shape: tuple[int, ...]
    lies: tuple[int, ...]
    unfolded: tuple[int, ...]
    dtype: jnp.dtype
    order: tuple[int, ...]
    heads: int | None
    offset: int
    nbytes: int
    sharding: Sharding
    gathered: Sharding

    def to_image(self, pages: Array) -> Array:
        """Pages ``[N, ...]`` of the device in the image's order of axes."""
        kept = pages[..., : self.unfolded[-1]] if self.padding else pages.reshape(-1, *self.unfolded)
        return kept.transpose(0, *(1 + axis for axis in self.order))

    def to_device(self, pages: Array) -> Array:
        """The inverse of :meth:`to_image`."""
        unfolded = pages.transpose(0, *(1 + self.order.index(axis) for axis in range(len(self.order))))
        if self.padding:
            return jnp.pad(unfolded, [(0, 0)] * len(self.lies) + [(0, self.padding)])
        return unfolded.reshape(-1, *self.lies)

    @property
    def padding(self) -> int:
        """Elements at the end of each row on the device that an image has not."""
        return self.lies[-1] - self.unfolded[-1] if len(self.lies) == len(self.unfolded) else 0


class Image:
    """How the images of a pool's pages look, and what turns what the device gives into them and back.

    Attributes:
        nbytes: of one image.
        offsets: of each of the pool's buffers, layer by layer, where it begins in an image.
        plain: whether a page's bytes on the device are those of its image, array by array.
        together: whether several processes compute what is taken from the device: all of them, or none.
    """

    def __init__(self, pool: Pool, copies: int = 1) -> None:
        """``copies``: how often each KV head of the model is repeated on the devices."""
        self.layers = pool.layers
        self.copies = copies
        pieces: list[Piece] = []
        at = 0
        layout = pool.layout
        for array, axes, unfolded, order, sharding in zip(
            layout.buffers(1), layout.axes, layout.unfolded, layout.image, pool.shardings, strict=True
        ):
            heads = order.index(axes.index("kv_heads") - 1) if "kv_heads" in axes else None
            shape = [unfolded[axis] for axis in order]
            if heads is not None:
                shape[heads] //= copies
            nbytes = math.prod(shape) * array.dtype.itemsize
            placed = _transposed(sharding, order)
            gathered = placed
            if isinstance(placed, NamedSharding) and not placed.is_fully_addressable:
                gathered = NamedSharding(placed.mesh, PartitionSpec())
            lies = array.shape[1:]
            pieces.append(Piece(tuple(shape), lies, unfolded, array.dtype, order, heads, at, nbytes, placed, gathered))
            at += pool.layers * nbytes
        self.pieces = tuple(pieces)
        self.nbytes = at
        self.offsets = [p.offset + layer * p.nbytes for layer in range(pool.layers) for p in self.pieces]
        self.together = not all(sharding.is_fully_addressable for sharding in pool.shardings)
        alone = all(sharding.num_devices == 1 for sharding in pool.shardings)
        self.plain = alone and all(p.order == tuple(range(len(p.order))) and not p.padding for p in self.pieces)

    def store(self, taken: Sequence[Sequence[Array]], images: Images, rows: Rows) -> None:
        """Write what was taken from the device, the buffers ``[N or more, ...]`` of each layer, to the images ``rows``.

        Waits until the device has computed it.
        """
        count = len(rows)
        for i, (piece, view) in enumerate(self._views(images)):
            for layer, buffers in enumerate(taken):
                shards = buffers[i].addressable_shards
                # Of what is whole everywhere the first copy may be another process's.
                whole = buffers[i].is_fully_replicated
                for shard in shards[:1] if whole else (each for each in shards if not each.replica_id):
                    data = np.asarray(shard.data)[:count].view(np.uint8)
                    into: list[slice] = [slice(None)] * (view.ndim - 2)
                    if piece.heads is not None:
                        # Of the copies of a head the first is written.
                        held = shard.index[1 + piece.heads]
                        first, stop = held.start or 0, held.stop or piece.shape[piece.heads] * self.copies
                        skip = -first % self.copies
                        data = data[(slice(None), *into[: piece.heads], slice(skip, None, self.copies))]
                        into[piece.heads] = slice((first + skip) // self.copies, -(-stop // self.copies))
                        if not data.shape[1 + piece.heads]:
                            continue
                    view[(rows, layer, *into)] = data

    def fetch(self, images: Images, rows: Rows, count: int) -> list[list[Array]]:
        """The images ``rows`` as buffers ``[count, ...]`` of each layer, on the devices; beyond the rows zeros."""
        layers: list[list[Array]] = [[] for _ in range(self.layers)]
        for piece, view in self._views(images):
            for layer, buffers in enumerate(layers):
                block = np.zeros((count, *view.shape[2:]), np.uint8)
                block[: len(rows)] = view[rows, layer]
                data = block.view(piece.dtype)
                if piece.heads is not None and self.copies > 1:
                    data = data.repeat(self.copies, axis=1 + piece.heads)
                buffers.append(jax.make_array_from_callback(data.shape, piece.sharding, data.__getitem__))
        return layers

    def _views(self, images: Images) -> Iterator[tuple[Piece, Images]]:
        """Each piece, and ``images`` as its bytes ``[rows, layers, *shape]``, the last axis in bytes."""
        for piece in self.pieces:
            part = images[:, piece.offset : piece.offset + self.layers * piece.nbytes]
            *lead, last = piece.shape
            yield piece, part.reshape(len(images), self.layers, *lead, last * piece.dtype.itemsize)


def image_bytes(layout: Layout, layers: int, copies: int = 1) -> int:
    """Bytes of the image of a page of ``layers`` layers, whose KV heads are repeated so often on the devices."""
    return layers * sum(
        math.prod(shape) * array.dtype.itemsize // (copies if "kv_heads" in axes else 1)
        for array, axes, shape in zip(layout.buffers(1), layout.axes, layout.unfolded, strict=True)
    )


def _transposed(sharding: Sharding, order: Sequence[int]) -> Sharding:
    """The sharding of pages whose axes, after the first, were put in ``order``."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (1 + len(order) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(None, *(spec[1 + axis] for axis in order)))
