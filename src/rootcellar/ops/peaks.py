"""The largest of each row of scores, and what all of it weigh beside that: on CPUs by a kernel in C++."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rootcellar.ops.kernels import runs_vectors, vectors


class Peaks(NamedTuple):
    """What rows of scores [N, V] have.

    Attributes:
        at: int32 [N], where each row's first largest score is.
        top: float32 [N], that score.
        mass: float32 [N], the sum of the exponentials of all scores less that one, in one order whatever N is.

    A row with a score that is not a number has the first such for its largest. It has no mass (NaN), like a row whose
    largest is not finite.
    """

    at: Array
    top: Array
    mass: Array


def peaks(scores: Array) -> Peaks:
    """The peaks of ``scores`` float32 [N, V].

    XLA for CPUs finds a largest one's place element by element, or in more passes, and writes out what it need not: at
    16 rows of 49,152 it takes six times as long.
    """
    return Peaks(*lax.platform_dependent(scores, cpu=_native if runs_vectors(vectors()) else _by_xla, default=_by_xla))


def _native(scores: Array) -> tuple[Array, Array, Array]:
    n = (scores.shape[0],)
    shapes = [
        jax.ShapeDtypeStruct(n, jnp.int32),
        jax.ShapeDtypeStruct(n, jnp.float32),
        jax.ShapeDtypeStruct(n, jnp.float32),
    ]
    at, top, mass = jax.ffi.ffi_call("rootcellar_peaks", shapes)(scores, vectors=vectors())
    return at, top, mass


def _by_xla(scores: Array) -> tuple[Array, Array, Array]:
    top = jnp.max(scores, axis=-1)
    mass = jnp.sum(jnp.exp(scores - top[:, None]), axis=-1)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32), top, mass
