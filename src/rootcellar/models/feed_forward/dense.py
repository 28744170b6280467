"""The feed-forward: down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x)))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import jax

from rootcellar.models import packing
from rootcellar.models.feed_forward.activations import ACTIVATIONS
from rootcellar.models.spec import Declare, Params
from rootcellar.ops.products import product


@dataclass(frozen=True)
class Dense:
    """Gate, up and down, each with a bias or none. ``activation``: a name in ``ACTIVATIONS``.

    ``gated``: whether there is a gate; without, the activation is of what goes up (Nemotron-H).
    """

    intermediate_size: int
    bias: bool = False
    activation: str = "silu"
    gated: bool = True

    @property
    def _inward(self) -> str:
        """The name of what leads in."""
        return "gate_up" if self.gated else "up"

    def width(self, embed: int) -> int:  # noqa: ARG002 - its result is counted for every layer
        """See ``FeedForward``."""
        return self.intermediate_size

    def declare(self, declare: Declare, embed: int) -> Params:
        """``gate_up`` [E, 2, I], or without a gate ``up`` [E, 1, I]; ``down`` [I, E]; biases where there are any."""
        inner, name, layers = self.intermediate_size, self._inward, 2 if self.gated else 1
        params: Params = {
            name: declare(name, (embed, layers, inner), ("embed", None, "mlp"), "random", packing.beside, (0,)),
            "down": declare("down", (inner, embed), ("mlp", "embed"), "random", packing.transposed, (0,)),
        }
        if self.bias:
            params[f"{name}_bias"] = declare(
                f"{name}_bias", (layers, inner), (None, "mlp"), "zeros", packing.beside_bias
            )  # fmt: skip
            params["down_bias"] = declare("down_bias", (embed,), (None,), "zeros")
        return params

    def served(self, tp_size: int) -> Self:  # noqa: ARG002 - gate and up are axes of their own
        """See ``FeedForward``."""
        return self

    def as_served(self, params: Params, tp_size: int) -> Params:  # noqa: ARG002
        """See ``FeedForward``."""
        return params

    def apply(
        self,
        params: Params,
        x: jax.Array,
        tell: Callable[[jax.Array], None] | None = None,  # noqa: ARG002
    ) -> jax.Array:
        """``[T, E]`` of ``x`` [T, E]; there is no router that chooses."""
        rows = product(x, params[self._inward])
        if self.bias:
            rows = rows + params[f"{self._inward}_bias"]
        inner = ACTIVATIONS[self.activation](rows[:, 0])
        out = product(inner * rows[:, 1] if self.gated else inner, params["down"])
        return out + params["down_bias"] if self.bias else out
