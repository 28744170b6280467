"""A mixture of experts: each token goes through the few experts that a router chooses, and through a shared one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from rootcellar.errors import ModelError
from rootcellar.models import packing
from rootcellar.models.feed_forward.activations import ACTIVATIONS
from rootcellar.models.feed_forward.dense import Dense
from rootcellar.models.spec import Axis, Declare, Init, Packing, Params, ParamSpec
from rootcellar.ops.experts import Router, grouped, route


@dataclass(frozen=True)
class Clamp:
    """gpt-oss' gate: ``min(g, limit) * sigmoid(alpha * min(g, limit)) * (clip(u, -limit, limit) + 1)``."""

    limit: float
    alpha: float


STORED: Mapping[str, tuple[Packing, Packing]] = {
    "apart": (packing.each_gate_up, packing.each_transposed),
    "linear": (packing.all_gate_up, packing.all_transposed),
    "halves": (packing.halves, packing.same),
    "interleaved": (packing.interleaved, packing.same),
}
"""How checkpoints store experts (packing of gate and up, of down): tensors of each expert apart, under names with
``{expert}`` in them (DeepSeek, Qwen); all experts in one, as linear layers ``[N, out, in]`` (Granite); as ``[N, in,
out]`` with gates before ups (Llama 4), or with gates and ups taking turns (gpt-oss)."""


@dataclass(frozen=True)
class Experts:
    """``router.experts`` experts of ``intermediate_size``, of which each token uses ``router.top_k``.

    Attributes:
        stored: how the checkpoint stores them: a name in ``STORED``.
        bias: gate, up and down have biases.
        router_bias: the router's scores have one.
        activation: a name in ``ACTIVATIONS``; ``clamp``, where given, stands in its place.
        weigh: whether the router's weights multiply what experts give, or what they are given (Llama 4).
        shared: the expert that every token goes through; ``shared_gate``: multiplied by a learned sigmoid.
        parts: in how many parts gate and up lie, one for each device that they are split over.
    """

    router: Router
    intermediate_size: int
    stored: Literal["apart", "linear", "halves", "interleaved"]
    bias: bool = False
    router_bias: bool = False
    activation: str = "silu"
    clamp: Clamp | None = None
    weigh: Literal["outputs", "inputs"] = "outputs"
    shared: Dense | None = None
    shared_gate: bool = False
    parts: int = 1

    def __post_init__(self) -> None:
        if self.bias and self.stored not in ("halves", "interleaved"):
            raise ModelError(f"experts stored {self.stored!r} with biases are not known")

    def width(self, embed: int) -> int:
        """See ``FeedForward``: an expert's answers are kept apart until they are weighed."""
        shared = 0 if self.shared is None else self.shared.width(embed)
        return self.router.top_k * (self.intermediate_size + embed) + shared

    def declare(self, declare: Declare, embed: int) -> Params:
        """``router`` [E, N], ``experts_gate_up`` [N, P, E, 2 * I / P], gates before ups in each of P parts,
        ``experts_down`` [N, I, E]; where there are any: ``router_bias`` and ``correction`` [N], the experts' biases,
        ``shared_gate`` [E, 1], and the shared expert's parameters under ``shared``. Tensors are packed as one part.
        """  # fmt: skip
        count, inner, parts = self.router.experts, self.intermediate_size, self.parts
        gate_up_packing, down_packing = STORED[self.stored]
        gate_up: tuple[Axis, ...] = (None, "mlp", "embed", None)
        wide = 2 * inner // parts
        params: Params = {
            "router": declare("router", (embed, count), ("embed", None), "random", packing.transposed),
            "experts_gate_up": _of_each(
                declare("experts_gate_up", (count, parts, embed, wide), gate_up, "random", gate_up_packing)
            ),
            "experts_down": _of_each(
                declare("experts_down", (count, inner, embed), (None, "mlp", "embed"), "random", down_packing)
            ),
        }
        if self.router_bias:
            params["router_bias"] = declare("router_bias", (count,), (None,), "zeros")
        if self.router.correction:
            params["correction"] = replace(declare("correction", (count,), (None,), "zeros"), wide=True)
        if self.bias:
            axes: tuple[Axis, ...] = (None, "mlp", None)
            params["experts_gate_up_bias"] = declare(
                "experts_gate_up_bias", (count, parts, wide), axes, "zeros", gate_up_packing
            )
            params["experts_down_bias"] = declare("experts_down_bias", (count, embed), (None, None), "zeros")
        if self.shared is not None:
            params["shared"] = self.shared.declare(_shared(declare), embed)
        if self.shared_gate:
            params["shared_gate"] = declare("shared_gate", (embed, 1), ("embed", None), "random", packing.transposed)
        return params

    def served(self, tp_size: int) -> Self:
        """See ``FeedForward``: a device has a range of gates and the same range of ups, beside each other."""
        return self if self.intermediate_size % tp_size else replace(self, parts=tp_size)

    def as_served(self, params: Params, tp_size: int) -> Params:
        """See ``FeedForward``: ``[N, 1, .., 2 * I]`` to ``[N, P, .., 2 * I / P]``."""
        parts = self.served(tp_size).parts
        apart = {
            name: _in_parts(params[name], parts)
            for name in ("experts_gate_up", "experts_gate_up_bias")
            if name in params and parts > 1
        }
        return {**params, **apart}

    def apply(self, params: Params, x: jax.Array, tell: Callable[[jax.Array], None] | None = None) -> jax.Array:
        """``[T, E]`` of ``x`` [T, E]; ``tell`` gets the experts that were chosen, int32 [T, K]."""
        scores = jnp.einsum("te,en->tn", x, params["router"], preferred_element_type=jnp.float32)
        if self.router_bias:
            scores = scores + params["router_bias"]
        correction = params["correction"] if self.router.correction else None
        chosen, weights = route(self.router, scores, correction)
        if tell is not None:
            tell(chosen)
        weights = weights.astype(x.dtype)

        def middle(rows: jax.Array, expert: jax.Array) -> jax.Array:
            return self._activate(rows + params["experts_gate_up_bias"][expert] if self.bias else rows)

        rows = x
        if self.weigh == "inputs":
            rows = (x[:, None] * weights[:, :, None]).reshape(-1, x.shape[1])
        out = grouped(rows, chosen, params["experts_gate_up"], middle, params["experts_down"])
        if self.bias:
            out = out + params["experts_down_bias"][chosen]
        out = jnp.sum(out, axis=1) if self.weigh == "inputs" else jnp.einsum("tke,tk->te", out, weights)
        if self.shared is None:
            return out
        common = self.shared.apply(params["shared"], x)
        if self.shared_gate:
            common = common * jax.nn.sigmoid(x @ params["shared_gate"])
        return out + common

    def _activate(self, rows: jax.Array) -> jax.Array:
        gate, up = jnp.split(rows, 2, axis=-1)
        if self.clamp is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate = jnp.minimum(gate, self.clamp.limit)
        up = jnp.clip(up, -self.clamp.limit, self.clamp.limit)
        return gate * jax.nn.sigmoid(self.clamp.alpha * gate) * (up + 1)


def _in_parts(array: Any, parts: int) -> Any:
    """Gates before ups in each of ``parts`` ranges of both, which become an axis of their own."""
    count, _, *inputs, wide = array.shape
    ranges = array.reshape(count, *inputs, 2, parts, wide // 2 // parts)
    *between, halves, part, inner = range(1, ranges.ndim)
    return ranges.transpose(0, part, *between, halves, inner).reshape(count, parts, *inputs, wide // parts)


def _of_each(spec: ParamSpec) -> ParamSpec:
    """``spec`` as one of which experts are taken; for ``{expert}`` in its sources stands the index of each in turn."""
    spec = replace(spec, in_order=True)
    if not any("{expert}" in source for source in spec.sources):
        return spec
    each = (source.replace("{expert}", str(e)) for e in range(spec.shape[0]) for source in spec.sources)
    return replace(spec, sources=tuple(each))


def _shared(declare: Declare) -> Declare:
    """Names the shared expert's parameters ``shared_...`` in the family's table."""

    def prefixed(
        name: str,
        shape: tuple[int, ...],
        axes: tuple[Axis, ...],
        init: Init,
        packing: Packing = packing.same,
        inputs: tuple[int, ...] = (),
    ) -> ParamSpec:
        return declare(f"shared_{name}", shape, axes, init, packing, inputs)

    return prefixed
