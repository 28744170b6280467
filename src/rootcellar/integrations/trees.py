"""What trainers' trees have in common: leaves by their path, and linear layers whose inputs come first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax import Array

Turning = Callable[[Array], list[Array]]
"""From an array of a trainer's to a checkpoint's tensors."""


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Each array of nested mappings with its path, as ``layers.0.attn.q_proj.w``."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def same(array: Array) -> list[Array]:
    """One tensor, as it is."""
    return [array]


def linear(inputs: int) -> Turning:
    """One linear layer whose ``inputs`` first axes are summed over."""

    def turn(array: Array) -> list[Array]:
        axes, shape = range(array.ndim), array.shape
        turned = array.transpose(*axes[inputs:], *axes[:inputs])
        return [turned.reshape(math.prod(shape[inputs:]), math.prod(shape[:inputs]))]

    return turn
