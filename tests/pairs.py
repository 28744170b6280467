"""Part of a cross product by day, all of it at night."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any


def combinations(*axes: Sequence[tuple[Any, ...]]) -> Iterator[tuple[bool, tuple[Any, ...]]]:
    """Every combination of the axes' values, joined, and whether it is one of the few that cover all pairs.

    Of each two axes every value of one meets every value of the other in them. They are those whose indices sum to a
    multiple of the shortest axis' length: two values of other axes leave the shortest one choice, and one of the
    shortest leaves a third axis one at least. With three axes: their number divided by the shortest's length.
    """
    shortest = min(map(len, axes))
    for at in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [value for axis, i in zip(axes, at, strict=True) for value in axis[i]]
        yield sum(at) % shortest == 0, tuple(values)
