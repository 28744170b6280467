"""Tensors of a layer of each architecture's checkpoints, written out from definitions, not from the code under test.

``LAYERS[model_type](config, layer)`` gives shapes by name, the name without ``model.layers.N.``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def llama(config: Config, layer: int) -> Shapes:
    """Qwen 2 and 3, Llama 2 and 3, Mistral."""
    embed, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    qwen2, qwen3 = (config["model_type"] == name for name in ("qwen2", "qwen3"))
    linear: Shapes = {
        "self_attn.q_proj": (queries, embed),
        "self_attn.k_proj": (keys, embed),
        "self_attn.v_proj": (keys, embed),
        "self_attn.o_proj": (embed, queries),
        "mlp.gate_proj": (mlp, embed),
        "mlp.up_proj": (mlp, embed),
        "mlp.down_proj": (embed, mlp),
    }
    biased = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} if qwen2 else set()
    if config.get("attention_bias"):
        biased |= {name for name in linear if "attn" in name}
    if config.get("mlp_bias"):
        biased |= {name for name in linear if "mlp" in name}
    norms = ["input_layernorm", "post_attention_layernorm"]
    shapes = {**weights(linear), **{f"{name}.bias": linear[name][:1] for name in biased}, **norm(embed, *norms)}
    if qwen3:
        shapes |= norm(dim, "self_attn.q_norm", "self_attn.k_norm")
    return shapes


def deepseek(config: Config, layer: int) -> Shapes:
    """DeepSeek V2 and V3."""
    embed, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    straight, turned, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    queries = heads * (straight + turned)
    linear: Shapes = {
        "self_attn.kv_a_proj_with_mqa": (rank + turned, embed),
        "self_attn.kv_b_proj": (heads * (straight + value), rank),
        "self_attn.o_proj": (embed, heads * value),
    }
    shapes = norm(embed, "input_layernorm", "post_attention_layernorm") | norm(rank, "self_attn.kv_a_layernorm")
    if config["q_lora_rank"] is None:
        linear["self_attn.q_proj"] = (queries, embed)
    else:
        linear["self_attn.q_a_proj"] = (config["q_lora_rank"], embed)
        linear["self_attn.q_b_proj"] = (queries, config["q_lora_rank"])
        shapes |= norm(config["q_lora_rank"], "self_attn.q_a_layernorm")
    if config.get("attention_bias"):
        biased = [name for name in linear if name.endswith(("o_proj", "kv_a_proj_with_mqa", "q_a_proj"))]
        shapes |= {f"{name}.bias": linear[name][:1] for name in biased}
    if layer < config["first_k_dense_replace"]:
        return shapes | weights(linear) | weights(gated("mlp", embed, config["intermediate_size"]))
    inner = config["moe_intermediate_size"]
    linear["mlp.gate"] = (config["n_routed_experts"], embed)
    if config["model_type"] == "deepseek_v3":
        shapes["mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
    for expert in range(config["n_routed_experts"]):
        linear |= gated(f"mlp.experts.{expert}", embed, inner)
    linear |= gated("mlp.shared_experts", embed, inner * config["n_shared_experts"])
    return shapes | weights(linear)


def gated(prefix: str, embed: int, inner: int) -> Shapes:
    """A gated feed-forward's linear layers."""
    return {
        f"{prefix}.gate_proj": (inner, embed),
        f"{prefix}.up_proj": (inner, embed),
        f"{prefix}.down_proj": (embed, inner),
    }


def weights(linear: Shapes) -> Shapes:
    """Linear layers without biases."""
    return {f"{name}.weight": shape for name, shape in linear.items()}


def norm(size: int, *names: str) -> Shapes:
    """Norms."""
    return {f"{name}.weight": (size,) for name in names}


LAYERS: dict[str, Callable[[Config, int], Shapes]] = {
    "qwen2": llama,
    "qwen3": llama,
    "llama": llama,
    "mistral": llama,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
}
