"""Vectors on a grid of few bits (``plan.grids``): how they become codes and scales, and values again.

The scale of a block is its largest magnitude over the grid's largest value. It is rounded to what is stored before the
elements are brought onto the grid, so that reading and writing agree on it. For E2M1 (as NVFP4 has it, with a scale for
every 16 elements) the largest magnitude may also go to 4 rather than 6, whichever errs less in squares: between 4 and 6
there is nothing (Cook et al., 2025, "Four Over Six").

A token's codes are the same whoever makes them: compiled by XLA for any shape, or by the kernels for CPUs
(``ops/native/encode.inc``). So nothing is computed whose bits depend on the order of a sum or on which products are
fused with one: reciprocals are multiplied by, errors are summed as integers, and rotations are sums of pairs.

Floats of 8 bits without an exponent are not used (they are below a 28,000th of the largest), so that readers need not
know them. Codes of floats are kept as uint8, since XLA for CPUs widens whole pools of narrow floats in order to write
into them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from rootcellar.plan.grids import E2M1, E4M3, E5M2, INT8, Grid

_FLOATS = {E4M3: jnp.float8_e4m3fn, E5M2: jnp.float8_e5m2}
_SCALE_BITS = 7  # of a float16 that a scale of 8 bits leaves out: its sign is known, and 3 of 10 bits are kept
_LEAST_TOP = 4  # of E2M1: see above
_ERROR_UNITS = 2048  # in a step of the grid: squares of 16 errors, of at most 3 steps, are summed in 32 bits


def code_arrays(grid: Grid, lead: tuple[int, ...], dim: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Codes and scales of vectors ``[*lead, dim]``.

    Codes are ``[*lead, bytes]``: int8 or uint8. Scales are bfloat16 ``lead``, or, of blocks, uint8 ``[*lead, blocks]``:
    the middle bits of a float16, 5 of its exponent and 3 of its mantissa.
    """
    codes = jax.ShapeDtypeStruct((*lead, dim * grid.bits // 8), jnp.int8 if grid == INT8 else jnp.uint8)
    if grid.block:
        return codes, jax.ShapeDtypeStruct((*lead, grid.scales(dim)), jnp.uint8)
    return codes, jax.ShapeDtypeStruct(lead, jnp.bfloat16)


def encode(grid: Grid, vectors: Array) -> tuple[Array, Array]:
    """Codes and scales of ``vectors`` ``[..., dim]``; see :func:`code_arrays`."""
    x = vectors.astype(jnp.float32)
    if grid == E2M1:
        return _encode_e2m1(x)
    scale = (jnp.max(jnp.abs(x), axis=-1) * np.float32(1 / grid.top)).astype(jnp.bfloat16)
    on_grid = jnp.clip(_divided(x, scale.astype(jnp.float32)), -grid.top, grid.top)
    if grid == INT8:
        return jnp.round(on_grid).astype(jnp.int8), scale
    least, size = float(jnp.finfo(_FLOATS[grid]).tiny), jnp.abs(on_grid)
    normal = jnp.where(size < least / 2, 0, jnp.sign(on_grid) * jnp.maximum(size, least))
    codes = lax.bitcast_convert_type(normal.astype(_FLOATS[grid]), jnp.uint8)
    nan = np.array(np.nan, _FLOATS[grid]).view(np.uint8)  # XLA would leave it a sign, or not
    return jnp.where(jnp.isnan(on_grid), nan, codes), scale


def decode(grid: Grid, codes: Array, scales: Array) -> Array:
    """The float32 vectors ``[..., dim]`` of codes and scales."""
    if grid == E2M1:
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
        blocks = _e2m1_values(pairs.reshape(*scales.shape, grid.block)) * _scale_of_bits(scales)[..., None]
        return blocks.reshape(*codes.shape[:-1], -1)
    values = codes if grid == INT8 else lax.bitcast_convert_type(codes, _FLOATS[grid])
    return values.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]


def _divided(x: Array, scale: Array) -> Array:
    """``x`` [..., n] times the reciprocal of its ``scale`` [...]; zeros where that is zero."""
    return jnp.where(scale[..., None] == 0, 0, x * (1 / scale)[..., None])


# --- four bits --------------------------------------------------------------------------------------------------------


def _encode_e2m1(x: Array) -> tuple[Array, Array]:
    blocks = x.reshape(*x.shape[:-1], -1, E2M1.block)
    most = jnp.max(jnp.abs(blocks), axis=-1)
    wide, narrow = (_bits_of_scale(most * np.float32(1 / top)) for top in (E2M1.top, _LEAST_TOP))

    def errs(scales: Array) -> Array:
        scale = _scale_of_bits(scales)
        steps = jnp.abs(_divided(blocks, scale))
        units = jnp.round((steps - _e2m1_values(_e2m1_codes(steps))) * _ERROR_UNITS).astype(jnp.int32)
        return jnp.sum(units * units, axis=-1).astype(jnp.float32) * (scale * scale)

    # (Where the wider scale is too small to be one, the narrower errs less, or is none either.)
    scales = jnp.where((errs(narrow) < errs(wide)) | (wide == 0), narrow, wide)
    codes = _e2m1_codes(_divided(blocks, _scale_of_bits(scales))).reshape(*x.shape)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def _bits_of_scale(scale: Array) -> Array:
    """The nearest scale of 8 bits: a float16 without sign and with 3 bits of mantissa, from 7.6e-6 to 61440."""
    half = lax.bitcast_convert_type(jnp.minimum(scale, 60000).astype(jnp.float16), jnp.uint16)
    return ((half + (1 << (_SCALE_BITS - 1))) >> _SCALE_BITS).astype(jnp.uint8)


def _scale_of_bits(bits: Array) -> Array:
    """Float32 scales."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint16) << _SCALE_BITS, jnp.float16).astype(jnp.float32)


def _e2m1_codes(x: Array) -> Array:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 to each magnitude, as its number; the sign is bit 3."""
    middles = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    number = sum((jnp.abs(x) > middle).astype(jnp.uint8) for middle in middles)
    return number | jnp.where(x < 0, jnp.uint8(8), jnp.uint8(0))


def _e2m1_values(codes: Array) -> Array:
    """Float32 values of codes of 4 bits: the exponent is 2 bits, the mantissa one."""
    magnitude = (codes & 7).astype(jnp.uint32)
    normal = lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    size = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * 0.5, normal)
    return jnp.where(codes < 8, size, -size)


# --- rotation ---------------------------------------------------------------------------------------------------------


@functools.cache
def hadamard(dim: int) -> NDArray[np.float32]:
    """An orthogonal, symmetric matrix ``[dim, dim]`` of equal magnitudes (Sylvester's), its own inverse.

    Where ``dim`` is no power of two: one for every so many elements as the largest power that divides it.
    """
    block = dim & -dim
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(dim // block, dtype=np.float32), matrix / np.float32(np.sqrt(block)))


def turned(vectors: Array) -> Array:
    """``vectors`` [..., dim] times :func:`hadamard`, float32; on CPUs by sums of pairs, which have one order."""
    return lax.platform_dependent(vectors.astype(jnp.float32), cpu=_by_pairs, default=_by_matrix)


def _by_matrix(x: Array) -> Array:
    return jnp.matmul(x, hadamard(x.shape[-1]), precision=lax.Precision.HIGHEST)


def _by_pairs(x: Array) -> Array:
    """The fast Walsh-Hadamard transform, neighbours first."""
    dim, apart = x.shape[-1], 1
    block, columns = dim & -dim, x.reshape(-1, dim).T
    while apart < block:
        a, b = jnp.unstack(columns.reshape(-1, 2, apart, columns.shape[1]), axis=1)
        columns = lax.optimization_barrier(jnp.stack([a + b, a - b], axis=1).reshape(columns.shape))
        apart *= 2
    # (Without a barrier XLA would multiply this factor by the reciprocal of a scale first.)
    return lax.optimization_barrier(columns * np.float32(1 / math.sqrt(block))).T.reshape(x.shape)
