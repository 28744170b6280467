"""A packed batch: rows of requests laid into one axis of tokens, at one of a few shapes.

        tokens     [ r1 r1 r1 . | r1 r1 . . | r2 . . . | . . . . ]     T = tiles * tile
        positions  [  8  9 10 11|12 13 -1 -1|40 -1 -1 -1|-1 ...  ]     -1: padding
        rows       [     0      |     0     |     1     |    0   ]     row of `tables`

A tile holds consecutive positions of one row. Decoding uses tiles of one token; prefill cuts each row's chunk into
tiles of `Shapes.tile` tokens. The number of tiles is rounded up to a power of two, so that few steps are compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rootcellar.plan.sizing import TILE, verified

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Vectors:
    """What stands for ids that are no tokens (an image's placeholders).

    ``at``: their indices in the part's tokens, ascending [K]; ``vectors`` [K, E] enter the first layer in their place.
    ``until``: the last position that each of them sees [K]; None: its own.
    """

    at: NDArray[np.integer]
    vectors: NDArray[np.floating] | Array
    until: NDArray[np.integer] | None = None


class BatchPart(NamedTuple):
    """Tokens [start, start + len(tokens)) of one request.

    ``row``: its row in the cache's page tables. ``tokens``: ids as the cache knows them; those for which there are
    ``given`` vectors may be anything of 64 bits. ``places``: int32 [3, len(tokens)], where rotary embeddings of three
    axes take them to be, if it is not where they stand. ``follows``: a guess, that comes after the part before it.
    """

    row: int
    start: int
    tokens: NDArray[np.integer]
    given: Vectors | None = None
    places: Ints | None = None
    follows: bool = False


@dataclass(frozen=True)
class Shapes:
    """The shapes a step may have: (tiles, tile).

    Attributes:
        tile: tokens in a tile of prefill, a power of two.
        prefill_tiles: most tiles of a prefill step.
        decode_rows: most rows of a decode step.
        guessed: most tokens that are guessed of a row, each of which a decode step computes like a row.
    """

    tile: int
    prefill_tiles: int
    decode_rows: int
    guessed: int = 0

    @classmethod
    def of(cls, chunked_prefill_size: int, max_running_requests: int, guessed: int = 0) -> Shapes:
        """Shapes that hold ``chunked_prefill_size`` prompt tokens and ``max_running_requests`` decoding rows.

        There is room for ``guessed`` tokens of a row alone; of several, for as many as there may be rows.
        """
        tile = min(TILE, 1 << (chunked_prefill_size.bit_length() - 1))
        return cls(tile, -(-chunked_prefill_size // tile), max_running_requests, guessed)

    def tiles_of(self, tokens: int) -> int:
        """Tiles that ``tokens`` tokens of one row take in a prefill step."""
        return -(-tokens // self.tile)

    @property
    def newest(self) -> int:
        """Rows of the largest decode step: as many tokens may be passed from one step to the next."""
        return _powers(self.decode_rows)[-1]

    @property
    def verified(self) -> int:
        """Tokens of the largest decode step: rows, and what is guessed of them."""
        return verified(self.decode_rows, self.guessed)

    def all(self) -> list[tuple[int, int]]:
        """Every shape, for warming up: decode first."""
        decode = [(n, 1) for n in _powers(self.verified)]
        prefill = [(n, self.tile) for n in _powers(self.prefill_tiles)]
        return decode + [s for s in prefill if s not in decode]


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range((limit - 1).bit_length() + 1)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """Vectors in a batch: ``where`` bool [T], ``vectors`` [T, E] enter the first layer instead of embeddings.

    ``until``: the last position that each token of the batch sees, int32 [T]; None: its own.
    """

    where: NDArray[np.bool_] | Array
    vectors: NDArray[np.floating] | Array
    until: Ints | Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Newest:
    """Tokens that only the device knows: ``tokens`` int32 [``Shapes.newest``], of which ``sources`` as in ``Batch``."""

    tokens: Array
    sources: Ints | Array


@dataclass(frozen=True)
class Batch:
    """What one step reads, as numpy arrays: see the picture above.

    Attributes:
        tokens: int64 [T]; 0 where a vector is given.
        positions: int32 [T], -1 for padding.
        rows: int32 [tiles].
        tables: for each kind int32 [tiles, W]: row i is part i's page table, zeros after the last part.
        last: int32 [tiles]: index in T of each part's last token, 0 after the last part.
        starts: index in T of each part's first token.
        given: vectors that stand for tokens; None, as for text alone, is a program of its own.
        sources: int32 [T] in a batch of single tokens, None in others: the row of the step before whose newest token
            stands in the token's place, because the host has not read it; -1: it is in ``tokens``.
        places: int32 [3, T] where a part says them; None: all are where ``positions`` has them.
    """

    tokens: NDArray[np.int64]
    positions: Ints
    rows: Ints
    tables: dict[str, Ints]
    last: Ints
    starts: tuple[int, ...] = ()
    given: Given | None = None
    sources: Ints | None = None
    places: Ints | None = None

    @classmethod
    def padding(cls, tiles: int, tile: int, widths: Mapping[str, int]) -> Batch:
        """A batch in which no token belongs to anybody; ``widths``: entries in a row of each kind's table."""
        zeros = np.zeros(tiles, np.int32)
        tables = {name: np.zeros((tiles, width), np.int32) for name, width in widths.items()}
        size = tiles * tile
        nobody = np.full(size, -1, np.int32)
        return cls(np.zeros(size, np.int64), nobody, zeros, tables, zeros, sources=nobody if tile == 1 else None)

    @classmethod
    def build(
        cls,
        parts: Sequence[BatchPart],
        tables: Mapping[str, Ints],
        tile: int,
        sources: Sequence[int] = (),
        spare: Mapping[str, int] = MappingProxyType({}),
    ) -> Batch:
        """Lay out ``parts``.

        ``tables``: for each kind the cache's page tables; ``tile``: tokens in a tile; ``sources``: see above, of each
        part, where any part has one; ``spare``: of each recurrent kind the first of the slots where the states after
        parts that follow others are left.
        """
        lengths = [len(part.tokens) for part in parts]
        counts = [-(-n // tile) for n in lengths]
        tiles = 1 << (sum(counts) - 1).bit_length()
        tokens = np.zeros(tiles * tile, np.int64)
        positions = np.full(tiles * tile, -1, np.int32)
        rows = np.zeros(tiles, np.int32)
        last = np.zeros(tiles, np.int32)
        ids = np.zeros(tiles, np.int64)
        ids[: len(parts)] = [part.row for part in parts]
        if sum(lengths) == len(parts) and tile == 1:  # decode: one token of each
            tokens[: len(parts)] = np.concatenate([part.tokens for part in parts])
            positions[: len(parts)] = [part.start for part in parts]
            rows[: len(parts)] = last[: len(parts)] = np.arange(len(parts))
            starts = list(range(len(parts)))
        else:
            starts = [tile * before for before in itertools.accumulate(counts[:-1], initial=0)]
            for i, (part, n, count, at) in enumerate(zip(parts, lengths, counts, starts, strict=True)):
                tokens[at : at + n] = part.tokens
                positions[at : at + n] = np.arange(part.start, part.start + n)
                rows[at // tile : at // tile + count] = i
                last[i] = at + n - 1
        chosen = {name: table[ids] for name, table in tables.items()}
        for name, first in spare.items():
            for slot, i in enumerate((i for i, part in enumerate(parts) if part.follows), first):
                chosen[name][i] = chosen[name][i - 1, 1], slot
        given = _given(parts, starts, tokens, positions)
        places = _places(parts, starts, positions)
        unread = None
        if tile == 1:
            unread = np.full(tiles, -1, np.int32)
            unread[: len(sources)] = sources
        return cls(tokens, positions, rows, chosen, last, tuple(starts), given, unread, places)


def _given(
    parts: Sequence[BatchPart], starts: Sequence[int], tokens: NDArray[np.int64], positions: Ints
) -> Given | None:
    """The parts' vectors at their places in the batch, whose ``tokens`` become 0 there."""
    found = [(at + p.given.at, p.given.vectors) for p, at in zip(parts, starts, strict=True) if p.given is not None]
    if not found:
        return None
    places = np.concatenate([at for at, _ in found])
    vectors = np.concatenate([np.asarray(rows, np.float32) for _, rows in found])
    tokens[places] = 0
    where = np.zeros(len(tokens), np.bool_)
    where[places] = True
    spread = np.zeros((len(tokens), vectors.shape[1]), np.float32)
    spread[places] = vectors
    until = None
    if any(part.given is not None and part.given.until is not None for part in parts):
        until = positions.copy()
        for part, at in zip(parts, starts, strict=True):
            if part.given is not None and part.given.until is not None:
                until[at + part.given.at] = part.given.until
    return Given(where, spread, until)


def _places(parts: Sequence[BatchPart], starts: Sequence[int], positions: Ints) -> Ints | None:
    """The parts' places where any says them; others are at their positions, in each axis."""
    found = [(at, part.places) for part, at in zip(parts, starts, strict=True) if part.places is not None]
    if not found:
        return None
    spread = np.tile(np.maximum(positions, 0), (len(found[0][1]), 1))
    for at, places in found:
        spread[:, at : at + places.shape[1]] = places
    return spread
