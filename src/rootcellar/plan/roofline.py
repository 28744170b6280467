"""The least time that a step can take: by the bytes that it must read and write, and by its arithmetic.

Each weight that the step's tokens pass is read once, all that its queries see of the cache once, and what is new is
written once; activations, which stay on the chip, and what devices tell each other are left out. Arithmetic is counted
at the chip's peak in bfloat16. A roofline (Williams, Waterman and Patterson, 2009) is then the longer of the two times:
no program for that step can take less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from rootcellar.cache.kind import Kind
from rootcellar.plan.fields import Raw
from rootcellar.plan.layers import Architecture, Group, need
from rootcellar.plan.stored import Heads, Latents, States
from rootcellar.plan.weights import matrices

GIB = 2**30
_OF_STATES = 6
"""Operations for each element of a recurrent state and token: decay, an outer product added, a product read."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One device.

    Attributes:
        flops: operations a second in bfloat16, without sparsity.
        bandwidth: bytes a second between its memory and what computes.
        memory: bytes.
        source: who says so.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    source: str


_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1200e9, 32 * GIB, _TPU + "v4"),
        Chip("v5e", 197e12, 819e9, 16 * GIB, _TPU + "v5e"),
        Chip("v5p", 459e12, 2765e9, 95 * GIB, _TPU + "v5p"),
        Chip("v6e", 918e12, 1638e9, 32 * GIB, _TPU + "v6e"),
        Chip("tpu7x", 2307e12, 7380e9, 192 * GIB, _TPU + "tpu7x"),
        Chip("h100", 989e12, 3350e9, 80 * 10**9, _NVIDIA + "h100/"),  # SXM
        Chip("h200", 989e12, 4800e9, 141 * 10**9, _NVIDIA + "h200/"),
        Chip("b200", 2250e12, 8000e9, 180 * 10**9, _NVIDIA + "dgx-b200/"),
    )
}
"""Those that are known by name."""


@dataclass(frozen=True)
class Work:
    """What a step does on one device. ``nbytes`` and ``flops``: by what it is done for; ``tokens``: of the step."""

    tokens: int
    nbytes: Mapping[str, float]
    flops: Mapping[str, float]

    @cached_property
    def total_bytes(self) -> float:
        """Bytes that are read and written."""
        return sum(self.nbytes.values())

    @cached_property
    def total_flops(self) -> float:
        """Operations."""
        return sum(self.flops.values())


@dataclass(frozen=True, slots=True)
class LeastTime:
    """The least time of a step on a chip, in seconds."""

    by_bandwidth: float
    by_compute: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.by_bandwidth, self.by_compute)

    @property
    def bound(self) -> str:
        """Which it is: "memory" or "compute"."""
        return "memory" if self.by_bandwidth >= self.by_compute else "compute"


def least_time(work: Work, chip: Chip) -> LeastTime:
    """The least time of a step on devices of one sort."""
    return LeastTime(work.total_bytes / chip.bandwidth, work.total_flops / chip.flops)


def decode(model: Architecture, kv_dtype: str, tp: int, batch: int, context: int) -> Work:
    """A step that computes one token for each of ``batch`` requests, which have ``context`` tokens with it.

    ``kv_dtype``: the cache's type, by name; ``tp``: devices that share the model evenly.
    """
    return _work(model, kv_dtype, tp, batch, context - 1, context)


def prefill(model: Architecture, kv_dtype: str, tp: int, start: int, stop: int) -> Work:
    """A step that computes the prompt tokens [start, stop) of one request."""
    return _work(model, kv_dtype, tp, 1, start, stop)


def held_bytes(model: Architecture, kv_dtype: str, tp: int, batch: int, context: int) -> int:
    """Bytes of weights, and of what ``batch`` requests of ``context`` tokens keep in the cache, on one device."""
    return round(matrices(model).nbytes / tp) + sum(
        batch * ((context - group.kind.start(context)) * group.token_bytes(kv_dtype, tp) + group.state_bytes(kv_dtype))
        for group in model.groups
    )


def _work(model: Architecture, kv_dtype: str, tp: int, rows: int, start: int, stop: int) -> Work:
    """Of ``rows`` requests the tokens [start, stop), of which the last of each is sampled."""
    every = matrices(model)
    tokens = rows * (stop - start)
    passed = expected_experts(every.of, every.chosen, tokens) / every.of if every.of else 0.0
    hidden = int(need(model.text, "hidden_size"))
    nbytes = {
        "weights": every.layers * every.narrow / tp,
        "experts": every.experts * passed * every.thin / tp,
        "vocabulary": (every.vocabulary / tp + tokens * hidden) * every.wide,
        "cache read": 0.0,
        "cache written": 0.0,
    }
    share = every.chosen / every.of if every.of else 0.0
    flops = {
        "weights": 2.0 * tokens * every.layers / tp,
        "experts": 2.0 * tokens * every.experts * share / tp,
        "vocabulary": 2.0 * rows * every.vocabulary / tp,
        "attention": 0.0,
    }
    for group in model.groups:
        each = group.token_bytes(kv_dtype, tp)
        states = rows * group.state_bytes(kv_dtype)
        before = start - group.kind.start(start)  # what is new is at hand when it is written
        nbytes["cache read"] += rows * before * each + (states if start else 0)
        nbytes["cache written"] += tokens * each + states
        flops["attention"] += rows * _attention(group, model.text, start, stop) / tp
    return Work(tokens, nbytes, flops)


def expected_experts(of: int, chosen: int, tokens: int) -> float:
    """How many of a layer's experts ``tokens`` tokens pass on average, where each takes any ``chosen`` alike."""
    return of * -math.expm1(tokens * math.log1p(-chosen / of)) if chosen < of else float(of)


def seen(kind: Kind, start: int, stop: int) -> int:
    """Tokens that the queries at [start, stop) see, themselves among them, summed over the queries."""
    return sum(at - kind.start(at) + 1 for at in range(start, stop))


def _attention(group: Group, text: Raw, start: int, stop: int) -> float:
    """Operations of one request's queries at [start, stop), over all devices."""
    layers, stored, kind = len(group.kind.layers), group.stored, group.kind
    if isinstance(stored, States):
        return float(_OF_STATES * layers * math.prod(stored.state) * (stop - start))
    heads, pairs = int(need(text, "num_attention_heads")), seen(kind, start, stop)
    if isinstance(stored, Heads):
        return float(layers * 4 * heads * stored.head_dim * pairs)
    assert isinstance(stored, Latents)
    # Scores over a whole latent and sums over its first part; or over keys and values that are made of latents, those
    # that were cached as well, which pays where many queries see them.
    value, nope = int(need(text, "v_head_dim")), int(need(text, "qk_nope_head_dim"))
    over_latents = 2 * heads * (2 * stored.rank + stored.rope_dim) * pairs
    made = 2 * heads * stored.rank * (nope + value) * (start - kind.start(start))
    return float(layers * min(over_latents, 2 * heads * (nope + stored.rope_dim + value) * pairs + made))
