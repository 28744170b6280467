"""Copying pages between a pool and images of them (``images.py``), while steps run.

A copy *reads* pages before any later step may overwrite them, and *writes* them before any later step reads them: both
are programs over the pool's buffers, so dataflow orders them among steps. Reading begins on the thread that runs the
steps and ends on any; for writing, images are *fetched* on any thread, and written by the one that runs the steps.

Programs are compiled for a few numbers of pages; what is too many is copied to or from the page of padding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.pools import direct
from rootcellar.pools.images import Image, Images, Rows
from rootcellar.pools.pool import Pool

log = logging.getLogger(__name__)

BLOCKS = (1, 4, 16, 64)
"""Numbers of pages for which copies are compiled."""

PageNumbers = NDArray[np.int32]
Wait = Callable[[], None]
"""Waits until a copy is done, on any thread; raises what went wrong."""
Fetched = object
"""What :meth:`Copier.fetch` leaves to :meth:`Copier.write`."""


class Copier(Protocol):
    """Copies pages of one pool."""

    @property
    def image(self) -> Image:
        """How a page looks away from the device."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether images are written from where they lie, so that fetching them costs nothing."""
        ...

    def read(self, pages: PageNumbers, images: Images, rows: Rows) -> Wait:
        """Begin to copy ``pages[i]`` to the image ``rows[i]``, as they are now. The images are whole after the wait."""
        ...

    def fetch(self, images: Images, rows: Rows) -> Fetched:
        """Make the images ``rows`` ready to be written; on any thread."""
        ...

    def write(self, pages: PageNumbers, fetched: Fetched) -> Wait:
        """Copy what was fetched to ``pages``, before any later step. The images are no longer read after the wait."""
        ...

    def compile(self) -> None:
        """Compile what copies need, by copying padding; between two steps."""
        ...


def copier(pool: Pool, copies: int = 1) -> Copier:
    """The fastest copier for a pool, each KV head of which is repeated ``copies`` times on its devices."""
    image = Image(pool, copies)
    return InPlace(pool, image) if image.plain and direct.available() else Blocks(pool, image)


def cut(count: int) -> Iterator[tuple[int, int, int]]:
    """``count`` pages in blocks, ``(start, stop, pages of the block)``: few, and at least half full."""
    start = 0
    while start < count:
        left = count - start
        size = next((size for size in BLOCKS if left <= size < 2 * left), max(s for s in BLOCKS if s <= left))
        yield start, min(count, start + size), size
        start += size


def read_pages(source: Copier, pages: PageNumbers) -> Images:
    """The images of ``pages``, in new memory, some at a time: what is copied lies on the device twice for a while."""
    images: Images = np.empty((len(pages), source.image.nbytes), np.uint8)
    for at in range(0, len(pages), BLOCKS[-1]):
        rows = np.arange(at, min(at + BLOCKS[-1], len(pages)))
        source.read(pages[rows], images, rows)()
    return images


class Blocks:
    """Copies by JAX alone: blocks of pages, gathered on the device and written down by the host, and back."""

    in_place: ClassVar[bool] = False

    def __init__(self, pool: Pool, image: Image) -> None:
        self._pool = pool
        self.image = image
        pieces = image.pieces

        def gather(buffers: list[tuple[Array, ...]], pages: Array) -> list[list[Array]]:
            # An array for each layer: XLA on CPUs is forty times slower at putting them into one.
            return [[p.to_image(a[pages]) for p, a in zip(pieces, buffers, strict=True)] for buffers in buffers]

        def scatter(
            buffers: list[tuple[Array, ...]], pages: Array, images: list[list[Array]]
        ) -> list[tuple[Array, ...]]:
            return [
                tuple(a.at[pages].set(p.to_device(i)) for p, a, i in zip(pieces, buffers, new, strict=True))
                for buffers, new in zip(buffers, images, strict=True)
            ]

        one = [[piece.gathered for piece in pieces] for _ in range(pool.layers)]
        held = [pool.shardings for _ in range(pool.layers)]
        self.gather = jax.jit(gather, out_shardings=one)
        self.scatter = jax.jit(scatter, donate_argnums=0, out_shardings=held)

    def read(self, pages: PageNumbers, images: Images, rows: Rows) -> Wait:
        """See ``Copier``."""
        taken = [
            (rows[start:stop], self.gather(self._pool.buffers, _padded(pages[start:stop], size)))
            for start, stop, size in cut(len(pages))
        ]

        def wait() -> None:
            while taken:
                into, buffers = taken.pop()  # and the device's copy of it is given back
                self.image.store(buffers, images, into)

        return wait

    def fetch(self, images: Images, rows: Rows) -> list[list[list[Array]]]:
        """See ``Copier``."""
        fetched = [self.image.fetch(images, rows[start:stop], size) for start, stop, size in cut(len(rows))]
        return jax.block_until_ready(fetched)

    def write(self, pages: PageNumbers, fetched: Fetched) -> Wait:
        """See ``Copier``."""
        assert isinstance(fetched, list)
        for (start, stop, size), buffers in zip(cut(len(pages)), fetched, strict=True):
            self._pool.buffers = self.scatter(self._pool.buffers, _padded(pages[start:stop], size), buffers)
        return _nothing

    def compile(self) -> None:
        """See ``Copier``."""
        for size in BLOCKS:
            padding, images = np.zeros(size, np.int32), np.zeros((1, self.image.nbytes), np.uint8)
            jax.block_until_ready(self.gather(self._pool.buffers, padding))
            self.write(padding, self.fetch(images, np.zeros(size, np.int64)))


@dataclass(frozen=True)
class _There:
    """Images that are written from where they lie."""

    images: Images
    rows: Rows


class InPlace:
    """Copies by C++ in one pass between the pool and the images, on CPUs."""

    in_place: ClassVar[bool] = True

    def __init__(self, pool: Pool, image: Image) -> None:
        self._pool = pool
        self.image = image
        self._read, self._write = direct.programs(image.offsets)

    def read(self, pages: PageNumbers, images: Images, rows: Rows) -> Wait:
        """See ``Copier``."""
        done = [self._read(self._pool.buffers, *block) for block in _addressed(pages, images, rows)]
        return _after(done, images)

    def fetch(self, images: Images, rows: Rows) -> _There:
        """See ``Copier``."""
        return _There(images, rows)

    def write(self, pages: PageNumbers, fetched: Fetched) -> Wait:
        """See ``Copier``."""
        assert isinstance(fetched, _There)
        done: list[Array] = []
        for block in _addressed(pages, fetched.images, fetched.rows):
            self._pool.buffers, last = self._write(self._pool.buffers, *block)
            done.append(last)
        return _after(done, fetched.images)

    def compile(self) -> None:
        """See ``Copier``."""
        nowhere = np.zeros(BLOCKS[-1], np.int32), np.zeros((BLOCKS[-1], 2), np.uint32)
        jax.block_until_ready(self._read(self._pool.buffers, *nowhere))
        self._pool.buffers, _ = self._write(self._pool.buffers, *nowhere)


def _addressed(pages: PageNumbers, images: Images, rows: Rows) -> Iterator[tuple[PageNumbers, NDArray[np.uint32]]]:
    """Blocks of pages and where their images lie: one size, since what is padding costs nothing."""
    size = BLOCKS[-1]
    assert images.strides[1] == 1, "an image is one block"
    for start in range(0, len(pages), size):
        some = rows[start : start + size]
        places = np.zeros(size, np.uint64)
        places[: len(some)] = images.ctypes.data + some.astype(np.uint64) * np.uint64(images.strides[0])
        yield _padded(pages[start : start + size], size), places.view(np.uint32).reshape(size, 2)


def _after(done: Sequence[Array], images: Images) -> Wait:
    def wait() -> None:
        jax.block_until_ready(done)
        assert images is not None  # and held until now

    return wait


def _padded(pages: PageNumbers, size: int) -> PageNumbers:
    return np.pad(np.asarray(pages, np.int32), (0, size - len(pages)))


def _nothing() -> None:
    """What was to be waited for is done."""
