"""How many bytes a cached token takes, from a model's ``config.json``: the figure's second axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rootcellar.errors import ConfigError


def bytes_per_token(config: Mapping[str, Any], bytes_per_value: float = 2.0) -> float:
    """KV bytes of one token over all layers, every layer full attention, on one device that holds all KV heads.

    ``config`` is a Hugging Face config (a multimodal one's ``text_config`` is used). MLA models (``kv_lora_rank``)
    store one latent per layer. Raises ``ConfigError`` naming the field that is missing.
    """
    fields = config.get("text_config") or config
    layers = _number(fields, "num_hidden_layers")
    if fields.get("kv_lora_rank"):
        return layers * (_number(fields, "kv_lora_rank") + _number(fields, "qk_rope_head_dim")) * bytes_per_value
    heads = _number(fields, "num_attention_heads")
    kv_heads = fields.get("num_key_value_heads") or heads
    head_dim = fields.get("head_dim") or _number(fields, "hidden_size") // heads
    return float(layers * 2 * kv_heads * head_dim * bytes_per_value)


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model config has {name}={value!r}; give a config.json that says it")
    return value
