"""Answers that do not depend on what runs beside them, to the bit (``enable_deterministic_inference``).

A sum of floats depends on its order, and fast kernels choose an order by how many rows there are. Here each product
goes over packed weights, in one order whatever the rows; attention takes keys in blocks that begin at multiples of
their length, by one kernel for prompts and answers; norms sum by the kernel of products, and tokens are drawn of 16
rows or more, from which on XLA sums a row in the same order. All else works on one element at a time. So tokens and
logprobs are the same in any batch, chunk, hit or retraction, and after any way through the tiers.
"""

from __future__ import annotations

from collections.abc import Collection

import jax

from rootcellar.config import EngineConfig
from rootcellar.errors import ConfigError
from rootcellar.models.feed_forward import Dense
from rootcellar.models.mixers import Attention
from rootcellar.models.model import ModelConfig
from rootcellar.models.params import declare, path_name
from rootcellar.models.spec import ParamSpec
from rootcellar.ops import products
from rootcellar.ops.backends import FIXED, fixed
from rootcellar.ops.panels import packer
from rootcellar.pools import Layout


def require(config: EngineConfig, model: ModelConfig) -> None:
    """Raise ``ConfigError`` where the setting is on and something in the engine would depend on the batch."""
    if config.enable_deterministic_inference and (why := _lacks(config, model)) is not None:
        raise ConfigError(f"enable_deterministic_inference cannot be used: {why}")


def _lacks(config: EngineConfig, model: ModelConfig) -> str | None:
    if config.tp_size > 1:
        return f"sums over tp_size={config.tp_size} devices are made by XLA; it needs tp_size=1"
    if not products.runs(jax.default_backend()):
        return "it needs the kernels in C++ on a CPU"
    if config.attention_backend == "xla":
        return "attention_backend='xla' depends on the batch; leave it at 'auto'"
    for layer in model.layers:
        for part, kind in ((layer.mixer, Attention), (layer.feed_forward, Dense)):
            if part is not None and not isinstance(part, kind):
                return f"{type(part).__name__} layers depend on the batch"
        if isinstance(layer.mixer, Attention) and layer.mixer.qk_unit is not None:
            return "queries and keys that are normed without a weight depend on the batch"
    specs: list[tuple[tuple[object, ...], ParamSpec]] = jax.tree_util.tree_leaves_with_path(declare(model))
    for path, spec in specs:
        if spec.inputs and packer("float32", spec.shape, spec.inputs) is None:
            return f"weights of the shape of {path_name(path)}, {list(spec.shape)}, cannot be packed"
    return None


def backend(layouts: Collection[Layout]) -> str:
    """The attention backend, by name; ``ConfigError`` where it cannot attend over all of ``layouts``."""
    for layout in layouts:
        if (why := fixed.lacks(layout, jax.default_backend())) is not None:
            raise ConfigError(f"enable_deterministic_inference cannot be used: {why}")
    return FIXED
