"""The numbers of few bits in which keys and values may be cached, and which of them each type of KV cache takes.

Plain values that layouts and the planner share; how a vector is brought onto a grid is ``pools.layouts.codes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rootcellar.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that an element can have, times a scale that it shares with its neighbours.

    Attributes:
        name: what they are called.
        bits: of an element.
        top: the largest value.
        scale_bytes: of a scale.
        block: elements that share a scale; 0: all of a vector.
    """

    name: str
    bits: int
    top: float
    scale_bytes: int
    block: int = 0

    def scales(self, dim: int) -> int:
        """Scales of a vector of ``dim`` elements. Raises ``ConfigError`` where blocks do not come out even."""
        if self.block and dim % self.block:
            raise ConfigError(
                f"{self.name} has a scale for every {self.block} elements, and vectors of {dim} are cached: "
                "choose another kv_cache_dtype"
            )
        return dim // self.block if self.block else 1

    def vector_bytes(self, dim: int) -> int:
        """Bytes of a vector of ``dim`` elements, with its scales."""
        return dim * self.bits // 8 + self.scales(dim) * self.scale_bytes


INT8 = Grid("int8", 8, 127, 2)
E4M3 = Grid("fp8_e4m3", 8, 448, 2)
E5M2 = Grid("fp8_e5m2", 8, 57344, 2)
E2M1 = Grid("fp4_e2m1", 4, 6, 1, 16)


@dataclass(frozen=True, slots=True)
class Narrow:
    """A type of KV cache of few bits.

    Attributes:
        keys, values: the grids of each.
        turned: whether each head is rotated first (a Hadamard matrix), which spreads what is large in a few elements
            over all of them. Scores do not change where queries are turned too.
    """

    keys: Grid
    values: Grid
    turned: bool = False


NARROW: Mapping[str, Narrow] = {
    "int8": Narrow(INT8, INT8, turned=True),
    "fp8_e4m3": Narrow(E4M3, E4M3),
    "fp8_e5m2": Narrow(E5M2, E5M2),
    "k8v4": Narrow(INT8, E2M1, turned=True),
    "fp4_e2m1": Narrow(E2M1, E2M1, turned=True),
}
"""By the name that ``kv_cache_dtype`` gives the type."""
