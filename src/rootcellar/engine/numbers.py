"""In which types an engine holds weights and the KV cache, and computes: what ``dtype`` and its kin come to."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rootcellar.config import EngineConfig
from rootcellar.models.model import ModelConfig
from rootcellar.ops import products
from rootcellar.plan.stored import SHORT_NAMES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Numbers:
    """``weights``: their dtype as it is said; ``holding``: how they are packed (``Placement.holding``); ``computed``:
    the dtype of arithmetic and of weights that are not packed; ``kv``: the KV cache's, as layouts know it.
    """

    weights: jnp.dtype
    holding: str | None
    computed: jnp.dtype
    kv: str


def numbers(config: EngineConfig, model: ModelConfig, *, loads: bool) -> Numbers:
    """What these settings come to on this platform. ``loads``: weights are read here, not handed over.

    A CPU packs what it loads, since its products are faster so, and computes in float32: weights are packed as integers
    where that is asked for, else as bfloat16 where ``dtype`` or the checkpoint says so. Weights that were handed over
    are used where they lie, unless answers may not depend on the batch.
    """
    platform = jax.default_backend()
    packs = loads and config.tp_size == 1 and products.runs(platform)
    weights = _said(config.dtype, model.dtype, platform)
    holding = config.quantization
    if holding is None and (packs or config.enable_deterministic_inference):
        saved = packs and config.dtype == "auto" and model.dtype == "bfloat16" and config.load_format != "dummy"
        holding = "bfloat16" if saved or weights == jnp.bfloat16 else "float32"
    kv = str(weights) if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return Numbers(weights, holding, jnp.dtype(jnp.float32) if packs else weights, SHORT_NAMES.get(kv, kv))


def _said(wanted: str, saved: str, platform: str) -> jnp.dtype:
    if wanted != "auto":
        return jnp.dtype(wanted)
    if platform == "cpu":
        if saved != "float32":
            log.info("dtype=auto: computing in float32, because CPUs are several times slower in %s", saved)
        return jnp.dtype(jnp.float32)
    return jnp.dtype(saved)
