"""Products of rows with weights: by XLA, or over packed ones by the kernels in C++ (``ops/native/products.h``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rootcellar.ops import panels
from rootcellar.ops.kernels import built, runs_vectors, vectors
from rootcellar.ops.panels import Packed

Weight = Array | Packed
"""What a product multiplies by."""
MANY = 256
"""See :func:`many`."""


def product(x: Array, w: Weight, inputs: Sequence[int] = (0,), dtype: jnp.dtype | None = None) -> Array:
    """``x`` [..., *inputs of ``w``] times ``w``: ``[..., *its other axes]``, summed over its axes ``inputs``.

    Over packed weights the arithmetic is in float32, but that rows which meet integers have 16 bits. ``dtype``: of the
    result; None: that of ``x``, or of ``x`` and ``w`` where the weight is an array.
    """
    axes = tuple(range(x.ndim - len(inputs), x.ndim)), tuple(inputs)
    if not isinstance(w, Packed):
        return jnp.tensordot(x, w, axes=axes, preferred_element_type=dtype)
    wanted = x.dtype if dtype is None else dtype
    few = x.size < many() * math.prod(w.shape[i] for i in w.inputs)
    if w.native and (w.fixed or few or panels.HOLDINGS[w.holding].grouped):
        return _native(x.astype(jnp.float32), w).astype(wanted)
    whole = panels.unpacked(w).astype(x.dtype)
    return jnp.tensordot(x, whole, axes=axes, preferred_element_type=dtype).astype(wanted)


def many() -> float:
    """Rows from which on XLA's product of floats is faster than that of the kernels, though it writes out packed ones.

    Infinitely many where vectors have 16 floats (AVX-512): kernels keep all multipliers busy and write nothing out.
    """
    return math.inf if vectors() in ("", "avx512", "avx512vnni") and runs_vectors("avx512") else MANY


def rows(w: Weight, which: Array, dtype: jnp.dtype) -> Array:
    """Rows ``which`` [T] of a matrix ``[N, E]``: ``[T, E]`` in ``dtype``."""
    return (panels.rows(w, which) if isinstance(w, Packed) else w[which]).astype(dtype)


def _native(x: Array, w: Packed) -> Array:
    outputs = [w.shape[i] for i in w.outputs]
    inputs, leads = math.prod(w.shape[i] for i in w.inputs), math.prod(outputs[:-1])
    flat = x.reshape(-1, inputs)
    built()
    call = jax.ffi.ffi_call(
        "rootcellar_product", jax.ShapeDtypeStruct((flat.shape[0], leads * outputs[-1]), jnp.float32)
    )
    out = call(
        flat, *w.arrays,
        form=w.holding, leads=np.int64(leads), length=np.int64(outputs[-1]), group=np.int64(w.group), vectors=vectors(),
        fixed=w.fixed,
    )  # fmt: skip
    return out.reshape(*x.shape[: x.ndim - len(w.inputs)], *outputs)


def runs(platform: str) -> bool:
    """Whether the kernels run there."""
    return platform == "cpu" and runs_vectors(vectors())
