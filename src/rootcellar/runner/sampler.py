"""Choosing the next token, on the device.

Randomness is a function of (seed of the request, position of the token): a request's choices do not depend on what runs
beside it, nor on whether it was retracted and computed again.

Top-k and top-p need a threshold, not an order: the bits of a positive float32 sort like an integer, so 31 halvings find
the exact threshold in 31 passes, where sorting a vocabulary of 150,000 takes a CPU longer than the rest of the step.
Tokens that tie at the threshold all stay, as in Hugging Face's top-k.

Logprobs are those of the model's own distribution, before penalties, temperature and truncation, or (*processed*) of
that which tokens are drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from rootcellar.ops.peaks import Peaks, peaks
from rootcellar.sampling_params import SamplingParams

_NEVER = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingBatch:
    """The sampling settings of a batch, one row for each row of logits.

    ``counts``, how often each token was generated, ``seen``, whether it stands in the prompt or the answer, and
    ``bias``, what is added to its logit, are as wide as the vocabulary. So they are None unless a request of the batch
    has a penalty or a bias, and all there when one has either: one more program, not three.
    """

    temperature: NDArray[np.float32] | Array
    top_k: NDArray[np.int32] | Array
    top_p: NDArray[np.float32] | Array
    min_p: NDArray[np.float32] | Array
    seed: NDArray[np.uint32] | Array
    """[N, 2] the high and the low half of each seed."""
    position: NDArray[np.int32] | Array
    banned: NDArray[np.int32] | Array
    """[N, B] token ids that must not be chosen; ids outside the vocabulary mean nothing."""
    allowed: NDArray[np.int32] | Array | None = None
    """[N, ceil(V / 32)] one bit for each token that may be chosen; None when all rows may choose any."""
    frequency: NDArray[np.float32] | Array | None = None
    presence: NDArray[np.float32] | Array | None = None
    repetition: NDArray[np.float32] | Array | None = None
    counts: NDArray[np.int32] | Array | None = None
    seen: NDArray[np.bool_] | Array | None = None
    bias: NDArray[np.float32] | Array | None = None


class Sampled(NamedTuple):
    """One request's part in a sampling step.

    Attributes:
        params: its sampling parameters.
        seed: its seed, of 64 bits; negative ones are those with the same bits.
        position: position of the token to choose.
        banned: token ids not to choose now.
        prompt: its prompt's ids, of which those outside the vocabulary mean nothing; output: those generated so far.
        allowed: int32 [ceil(V / 32)], a bit for each token that may be chosen; None: any.
    """

    params: SamplingParams
    seed: int
    position: int
    banned: Sequence[int]
    prompt: NDArray[np.integer]
    output: NDArray[np.integer]
    allowed: NDArray[np.int32] | None = None

    @property
    def adjusted(self) -> bool:
        """Whether a penalty or a bias changes its logits."""
        return self.params.penalized or len(self.params.logit_bias) > 0


def build(rows: Sequence[Sampled], size: int, vocab: int) -> SamplingBatch | None:
    """The settings of ``rows``, padded to ``size`` rows; None when every row is plain greedy."""
    if all(r.params.greedy and not r.banned and not r.adjusted and r.allowed is None for r in rows):
        return None
    width = 1 << (max(8, *(len(r.banned) for r in rows)) - 1).bit_length()
    banned = np.full((size, width), vocab, np.int32)
    for i, r in enumerate(rows):
        banned[i, : len(r.banned)] = r.banned

    def column(value: Callable[[Sampled], float], fill: float, dtype: type) -> NDArray[np.generic]:
        out = np.full(size, fill, dtype)
        out[: len(rows)] = [value(r) for r in rows]
        return out

    seeds = np.zeros((size, 2), np.uint32)
    seeds[: len(rows)] = [(r.seed >> 32 & 0xFFFFFFFF, r.seed & 0xFFFFFFFF) for r in rows]
    common = SamplingBatch(
        temperature=column(lambda r: 0.0 if r.params.greedy else r.params.temperature, 0.0, np.float32),
        top_k=column(lambda r: min(r.params.top_k, vocab) if r.params.top_k > 0 else vocab, vocab, np.int32),
        top_p=column(lambda r: r.params.top_p, 1.0, np.float32),
        min_p=column(lambda r: r.params.min_p, 0.0, np.float32),
        seed=seeds,
        position=column(lambda r: r.position, 0, np.int32),
        banned=banned,
        allowed=_allowed(rows, size, vocab),
    )
    if not any(r.adjusted for r in rows):
        return common
    counts = np.zeros((size, vocab), np.int32)
    seen = np.zeros((size, vocab), np.bool_)
    bias = np.zeros((size, vocab), np.float32)
    for i, r in enumerate(rows):
        for token, value in r.params.logit_bias:
            bias[i, token] = value
        np.add.at(counts[i], r.output, 1)
        # What is no token of the vocabulary (an image's placeholders) cannot be repeated.
        seen[i, r.prompt[(r.prompt >= 0) & (r.prompt < vocab)]] = True
        seen[i, r.output] = True
    values = {f.name: getattr(common, f.name) for f in fields(common)}
    values |= {
        "frequency": column(lambda r: r.params.frequency_penalty, 0.0, np.float32),
        "presence": column(lambda r: r.params.presence_penalty, 0.0, np.float32),
        "repetition": column(lambda r: r.params.repetition_penalty, 1.0, np.float32),
        "counts": counts,
        "seen": seen,
        "bias": bias,
    }
    return SamplingBatch(**values)


def _allowed(rows: Sequence[Sampled], size: int, vocab: int) -> NDArray[np.int32] | None:
    if all(r.allowed is None for r in rows):
        return None
    bits = np.full((size, -(-vocab // 32)), -1, np.int32)
    for i, r in enumerate(rows):
        if r.allowed is not None:
            bits[i] = r.allowed
    return bits


_LEAST = 16
"""Rows from which on XLA for CPUs sums a row in the same order, however many there are."""


def padded(rows: Array) -> Array:
    """``rows`` [N, ...] and others that mean nothing, so that what is made of a row does not depend on N."""
    missing = max(0, _LEAST - rows.shape[0])
    more = jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
    return lax.optimization_barrier(more)  # or XLA might see that nobody looks at the others


def sample(logits: Array, batch: SamplingBatch | None, *, processed: bool = False) -> tuple[Array, Array]:
    """Choose one token for each row of ``logits`` float32 [N, V].

    Returns:
        tokens int32 [N], and the logprob float32 [N] of each under the model's own distribution, or (``processed``)
        under the one that it was drawn from.
    """
    made = logits if batch is None else _processed(logits, batch)
    found = peaks(made if processed else logits)
    tokens = found.at if batch is None else peaks(made + _noise(batch, logits.shape[1])).at
    chosen = jnp.take_along_axis(made if processed else logits, tokens[:, None], axis=-1)
    return tokens, _logprobs(found, chosen)[:, 0]


def logprobs(scores: Array, values: Array) -> Array:
    """Logprobs float32 [N, k] of tokens whose scores are ``values`` [N, k], among all ``scores`` [N, V]."""
    return _logprobs(peaks(scores), values)


def _logprobs(of: Peaks, values: Array) -> Array:
    """The largest score is taken away first, so that what is rounded is as small as a logprob, not as large as a score.

    ``logsumexp`` gives the sum of both, rounded, which was most of the error that logprobs had.
    """
    return (values - of.top[:, None]) - jnp.log(of.mass)[:, None]


def cooled(scores: Array, temperatures: Array) -> Array:
    """``scores`` [N, V] over their ``temperatures`` [N], each row's largest taken away first: see :func:`logprobs`."""
    return (scores - jnp.max(scores, axis=-1, keepdims=True)) / temperatures[:, None]


def _processed(logits: Array, batch: SamplingBatch) -> Array:
    """What tokens are drawn from. Greedy rows take part with temperature 1 and are left whole: a batch mixes both.

    Rows that want no truncation are left whole too, and where there are no others its 62 passes are not made.
    """
    adjusted, greedy = _adjust(logits, batch), _greedy(batch)
    scaled = cooled(adjusted, jnp.where(greedy, 1.0, batch.temperature))
    some = (batch.top_k < logits.shape[1]) | (batch.top_p < 1) | (batch.min_p > 0)
    cut = jnp.asarray(some) & ~greedy
    return lax.cond(jnp.any(cut), lambda: jnp.where(cut[:, None], _truncate(scaled, batch), scaled), lambda: scaled)


def _greedy(batch: SamplingBatch) -> Array:
    return jnp.asarray(batch.temperature) <= 0


def _adjust(logits: Array, batch: SamplingBatch) -> Array:
    """Repetition penalty as in CTRL (Keskar et al., 2019), the other two as at OpenAI; then bias and bans."""
    if batch.counts is not None:
        factor = jnp.where(batch.seen, batch.repetition[:, None], 1.0)
        logits = jnp.where(logits > 0, logits / factor, logits * factor)
        logits = logits - batch.frequency[:, None] * batch.counts - batch.presence[:, None] * (batch.counts > 0)
        logits = logits + batch.bias
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, batch.banned].set(_NEVER, mode="drop")
    if batch.allowed is None:
        return logits
    tokens = jnp.arange(logits.shape[1])
    bits = (batch.allowed[:, tokens // 32] >> (tokens % 32)) & 1
    return jnp.where(bits == 1, logits, _NEVER)


def _threshold(weights: Array, enough: Callable[[Array], Array]) -> Array:
    """Per row, the largest positive float t for which ``enough(weights >= t)`` holds; bool [N, V] -> bool [N].

    ``enough`` must hold for all weights and stay true as the set grows.
    """

    def halve(i: Array, bits: Array) -> Array:
        trial = bits | (jnp.int32(1) << (30 - i))
        t = lax.bitcast_convert_type(trial, jnp.float32)
        return jnp.where(enough(weights >= t[:, None]), trial, bits)

    bits = lax.fori_loop(0, 31, halve, jnp.zeros(weights.shape[0], jnp.int32))
    return lax.bitcast_convert_type(bits, jnp.float32)


def _truncate(logits: Array, batch: SamplingBatch) -> Array:
    """Top-k, then top-p of what is left (renormalised), then min-p, in this order."""
    p = jax.nn.softmax(logits, axis=-1)
    t = _threshold(p, lambda kept: jnp.sum(kept, axis=-1) >= batch.top_k)
    p = jnp.where(p >= t[:, None], p, 0.0)
    mass = batch.top_p * jnp.sum(p, axis=-1)
    # Rounding must not empty the set: the likeliest token always stays.
    t = _threshold(p, lambda kept: jnp.sum(jnp.where(kept, p, 0.0), axis=-1) >= mass)
    t = jnp.where(batch.top_p >= 1, 0.0, t)
    top = jnp.max(p, axis=-1)
    t = jnp.minimum(jnp.maximum(t, batch.min_p * top), top)
    return jnp.where((p >= t[:, None]) & (p > 0), logits, _NEVER)


def _noise(batch: SamplingBatch, vocab: int) -> Array:
    """Gumbel's: to add it and take the largest is to draw. None for greedy rows."""

    def row(seed: Array, position: Array) -> Array:
        # What `jax.random.key` makes of a 64-bit seed, which it does not take in JAX's 32-bit mode.
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)

    return jnp.where(_greedy(batch)[:, None], 0.0, jax.vmap(row)(batch.seed, batch.position))


def top_logprobs(logits: Array, k: int, processed: SamplingBatch | None = None) -> tuple[Array, Array]:
    """The ``k`` likeliest tokens of each row of ``logits`` [N, V]: logprobs float32 [N, k] and ids int32 [N, k].

    ``processed``: of the distribution that these settings make of the model's.
    """
    if processed is not None:
        logits = _processed(logits, processed)
    values, ids = lax.top_k(logits, k)
    return logprobs(logits, values), ids


PROGRAMS = ("greedy", "drawn", "drawn by a grammar", "adjusted", "adjusted by a grammar")
"""The programs that :func:`sample` has for a number of rows, as :func:`every_program` lists them."""


def every_program(size: int, vocab: int) -> list[SamplingBatch | None]:
    """Settings that make :func:`sample` compile each of its programs for ``size`` rows.

    Greedy; drawn and adjusted, both with any token allowed and with some.
    """
    empty = np.zeros(0, np.int32)
    settings = [SamplingParams(temperature=1.0), SamplingParams(presence_penalty=1.0)]
    bits = [None, np.full(-(-vocab // 32), -1, np.int32)]
    rows = [Sampled(params, 0, 0, (), empty, empty, allowed) for params in settings for allowed in bits]
    return [None, *(build([row], size, vocab) for row in rows)]
