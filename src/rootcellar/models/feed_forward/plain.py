"""The feed-forward without a gate: down(activation(up(x)))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from rootcellar.models import packing
from rootcellar.models.feed_forward.activations import ACTIVATIONS
from rootcellar.models.spec import Declare, Params
from rootcellar.ops.products import product


@dataclass(frozen=True)
class Plain:
    """Up and down, each with a bias or none. ``activation``: a name in ``ACTIVATIONS``."""

    intermediate_size: int
    bias: bool = False
    activation: str = "relu2"

    def width(self, embed: int) -> int:  # noqa: ARG002 - its result is counted for every layer
        """See ``FeedForward``."""
        return self.intermediate_size

    def declare(self, declare: Declare, embed: int) -> Params:
        """``up`` [E, I], ``down`` [I, E], and their biases where there are any."""
        inner = self.intermediate_size
        params: Params = {
            "up": declare("up", (embed, inner), ("embed", "mlp"), "random", packing.transposed, (0,)),
            "down": declare("down", (inner, embed), ("mlp", "embed"), "random", packing.transposed, (0,)),
        }
        if self.bias:
            params["up_bias"] = declare("up_bias", (inner,), ("mlp",), "zeros")
            params["down_bias"] = declare("down_bias", (embed,), (None,), "zeros")
        return params

    def apply(
        self,
        params: Params,
        x: jax.Array,
        tell: Callable[[jax.Array], None] | None = None,  # noqa: ARG002
    ) -> jax.Array:
        """``[T, E]`` of ``x`` [T, E]; there is no router that chooses."""
        rows = product(x, params["up"])
        out = product(ACTIVATIONS[self.activation](rows + params["up_bias"] if self.bias else rows), params["down"])
        return out + params["down_bias"] if self.bias else out
