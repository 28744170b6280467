"""Models at their full sizes, cut to two periods of layers: what is compiled for TPUs."""

from __future__ import annotations

from typing import Any

from checkpoints import FAMILIES, make_config
from rootcellar.models.config import read_config
from rootcellar.models.model import ModelConfig
from rootcellar.plan.layers import Architecture, read_architecture
from rootcellar.plan.presets import PRESETS

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_scaling": ...,
    "vocab_size": 128256,
}
QWEN3_NEXT_80B: dict[str, Any] = {
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
}
_GPT_OSS_ROPE = {**FAMILIES["gpt-oss"]["rope_scaling"], "original_max_position_embeddings": 4096}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-3b": ("qwen2", {"num_hidden_layers": 2, "head_dim": ...}),
    "llama-3-8b": ("llama3", {**LLAMA_3_8B, "num_hidden_layers": 2}),
    "gemma-3-27b": ("gemma3", {"num_hidden_layers": 12, "query_pre_attn_scalar": 168}),
    "gpt-oss-120b": ("gpt-oss", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                                 "swiglu_limit": 7.0, "rope_scaling": _GPT_OSS_ROPE}),
    "deepseek-v3": ("deepseek3", {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 4}),
    "llama-4-scout": ("llama4", {"num_hidden_layers": 8, "interleave_moe_layer_step": 1, "floor_scale": 8192,
                                 "attn_scale": 0.1}),
    "bamba-9b": ("bamba", {"num_hidden_layers": 4, "head_dim": 128, "attn_layer_indices": [1, 3]}),
    "qwen3-next-80b": ("qwen3-next", {**QWEN3_NEXT_80B, "num_hidden_layers": 8}),
}  # fmt: skip
"""By name: the family in ``checkpoints.py``, and what is said beside ``plan.presets``, as ``config.json`` would."""


def config_of(name: str) -> dict[str, Any]:
    """A ``config.json`` with the published sizes and few layers, in bfloat16."""
    family, more = MODELS[name]
    preset = dict(PRESETS.get(name, {}))
    preset.update(preset.pop("text_config", {}))
    for told in ("architectures", "model_type", "quantization_config"):
        preset.pop(told, None)
    return make_config(family, **{**preset, "torch_dtype": "bfloat16", **more})


def model_of(name: str) -> tuple[ModelConfig, Architecture]:
    """The model, and what the planner makes of it."""
    raw = config_of(name)
    return read_config(raw), read_architecture(raw)
