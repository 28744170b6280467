"""Tensors of a layer of each architecture's checkpoints, written out from definitions, not from the code under test.

``LAYERS[model_type](config, layer)`` gives shapes by name, the name without ``model.layers.N.``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def llama(config: Config, layer: int) -> Shapes:
    """Qwen 2 (and 2.5-VL) and 3, Llama 2 and 3, Mistral."""
    embed, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    qwen2, qwen3 = (config["model_type"] in names for names in (("qwen2", "qwen2_5_vl"), ("qwen3",)))
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


def attention(config: Config, *biased: str) -> Shapes:
    """q, k, v and o of ordinary attention; ``biased``: those with a bias."""
    embed, dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    linear: Shapes = {
        "self_attn.q_proj": (queries, embed),
        "self_attn.k_proj": (keys, embed),
        "self_attn.v_proj": (keys, embed),
        "self_attn.o_proj": (embed, queries),
    }
    return weights(linear) | {f"self_attn.{x}_proj.bias": linear[f"self_attn.{x}_proj"][:1] for x in biased}


def qwen_moe(config: Config, layer: int) -> Shapes:
    """Qwen2-MoE and Qwen3-MoE."""
    embed, shared = config["hidden_size"], config["model_type"] == "qwen2_moe"
    shapes = attention(config, *("qkv" if shared else "")) | norm(embed, "input_layernorm", "post_attention_layernorm")
    if not shared:
        shapes |= norm(config["head_dim"], "self_attn.q_norm", "self_attn.k_norm")
    if layer in config["mlp_only_layers"]:
        return shapes | weights(gated("mlp", embed, config["intermediate_size"]))
    linear = {"mlp.gate": (config["num_experts"], embed)}
    for expert in range(config["num_experts"]):
        linear |= gated(f"mlp.experts.{expert}", embed, config["moe_intermediate_size"])
    if shared:
        linear |= {"mlp.shared_expert_gate": (1, embed)}
        linear |= gated("mlp.shared_expert", embed, config["shared_expert_intermediate_size"])
    return shapes | weights(linear)


def phi3(config: Config, layer: int) -> Shapes:
    """Phi 3 and 4."""
    embed, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    rows = embed + 2 * config["num_key_value_heads"] * embed // heads
    return norm(embed, "input_layernorm", "post_attention_layernorm") | weights(
        {
            "self_attn.qkv_proj": (rows, embed),
            "self_attn.o_proj": (embed, embed),
            "mlp.gate_up_proj": (2 * mlp, embed),
            "mlp.down_proj": (embed, mlp),
        }
    )


def olmo(config: Config, layer: int) -> Shapes:
    """OLMo 2 and 3."""
    embed, dim = config["hidden_size"], config["head_dim"]
    return (
        attention(config)
        | weights(gated("mlp", embed, config["intermediate_size"]))
        | norm(embed, "post_attention_layernorm", "post_feedforward_layernorm")
        | norm(config["num_attention_heads"] * dim, "self_attn.q_norm")
        | norm(config["num_key_value_heads"] * dim, "self_attn.k_norm")
    )


def glm4(config: Config, layer: int) -> Shapes:
    """GLM 4."""
    embed, mlp = config["hidden_size"], config["intermediate_size"]
    norms = ["input", "post_self_attn", "post_attention", "post_mlp"]
    return (
        attention(config, *"qkv")
        | weights({"mlp.gate_up_proj": (2 * mlp, embed), "mlp.down_proj": (embed, mlp)})
        | norm(embed, *(f"{name}_layernorm" for name in norms))
    )


def glm4_moe(config: Config, layer: int) -> Shapes:
    """GLM 4.5."""
    embed, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shapes = attention(config, *"qkv") | norm(embed, "input_layernorm", "post_attention_layernorm")
    shapes |= norm(config["head_dim"], "self_attn.q_norm", "self_attn.k_norm")
    if layer < config["first_k_dense_replace"]:
        return shapes | weights(gated("mlp", embed, config["intermediate_size"]))
    linear = {"mlp.gate": (experts, embed)} | gated("mlp.shared_experts", embed, inner * config["n_shared_experts"])
    for expert in range(experts):
        linear |= gated(f"mlp.experts.{expert}", embed, inner)
    return shapes | weights(linear) | {"mlp.gate.e_score_correction_bias": (experts,)}


def granite4(config: Config, layer: int) -> Shapes:
    """Granite 4."""
    embed, inner, shared = config["hidden_size"], config["intermediate_size"], config["shared_intermediate_size"]
    shapes = norm(embed, "input_layernorm", "post_attention_layernorm")
    shapes |= attention(config) if config["layer_types"][layer] == "attention" else mamba(config)
    shapes |= weights({"shared_mlp.input_linear": (2 * shared, embed), "shared_mlp.output_linear": (embed, shared)})
    experts = config["num_local_experts"]
    return shapes | weights(
        {
            "block_sparse_moe.router.layer": (experts, embed),
            "block_sparse_moe.input_linear": (experts, 2 * inner, embed),
            "block_sparse_moe.output_linear": (experts, embed, inner),
        }
    )


def gemma3(config: Config, layer: int) -> Shapes:
    """Gemma 2 and 3 (text)."""
    embed = config["hidden_size"]
    norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
    heads = norm(config["head_dim"], "self_attn.q_norm", "self_attn.k_norm")
    return (
        attention(config)
        | weights(gated("mlp", embed, config["intermediate_size"]))
        | norm(embed, *(f"{name}_layernorm" for name in norms))
        | (heads if config["model_type"] != "gemma2" else {})
    )


def gemma4(config: Config, layer: int) -> Shapes:
    """Gemma 4 (text, dense): full layers have heads of their own, and no values."""
    full = config["layer_types"][layer] == "full_attention"
    heads = {"head_dim": config["global_head_dim"], "num_key_value_heads": config["num_global_key_value_heads"]}
    shapes = gemma3({**config, **(heads if full else {})}, layer) | {"layer_scalar": (1,)}
    return {name: shape for name, shape in shapes.items() if not (full and "v_proj" in name)}


def gpt_oss(config: Config, layer: int) -> Shapes:
    """gpt-oss."""
    embed, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    return (
        attention(config, *"qkvo")
        | norm(embed, "input_layernorm", "post_attention_layernorm")
        | {
            "self_attn.sinks": (config["num_attention_heads"],),
            "mlp.router.weight": (experts, embed),
            "mlp.router.bias": (experts,),
            "mlp.experts.gate_up_proj": (experts, embed, 2 * inner),
            "mlp.experts.gate_up_proj_bias": (experts, 2 * inner),
            "mlp.experts.down_proj": (experts, inner, embed),
            "mlp.experts.down_proj_bias": (experts, embed),
        }
    )


def llama4(config: Config, layer: int) -> Shapes:
    """Llama 4 (text)."""
    embed, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = attention(config) | norm(embed, "input_layernorm", "post_attention_layernorm")
    if (layer + 1) % config["interleave_moe_layer_step"]:
        return shapes | weights(gated("feed_forward", embed, config["intermediate_size_mlp"]))
    return (
        shapes
        | weights(gated("feed_forward.shared_expert", embed, inner))
        | {
            "feed_forward.router.weight": (experts, embed),
            "feed_forward.experts.gate_up_proj": (experts, embed, 2 * inner),
            "feed_forward.experts.down_proj": (experts, inner, embed),
        }
    )


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


def bamba(config: Config, layer: int) -> Shapes:
    """Bamba."""
    embed, dim = config["hidden_size"], config["head_dim"]
    shapes = norm(embed, "input_layernorm", "pre_ff_layernorm")
    shapes |= weights(gated("feed_forward", embed, config["intermediate_size"]))
    if layer in config["attn_layer_indices"]:
        queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        linear = {f"self_attn.{x}_proj": (size, embed) for x, size in (("q", queries), ("k", keys), ("v", keys))}
        return shapes | weights({**linear, "self_attn.o_proj": (embed, queries)})
    return shapes | mamba(config)


def mamba(config: Config) -> Shapes:
    """A Mamba-2 layer of Bamba and Granite 4."""
    embed, heads = config["hidden_size"], config["mamba_n_heads"]
    inner = heads * config["mamba_d_head"]
    channels = inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"]
    linear: Shapes = {"mamba.in_proj": (inner + channels + heads, embed), "mamba.out_proj": (embed, inner)}
    shapes = {**weights(linear), **norm(inner, "mamba.norm")}
    shapes["mamba.conv1d.weight"] = (channels, 1, config["mamba_d_conv"])
    if config["mamba_conv_bias"]:
        shapes["mamba.conv1d.bias"] = (channels,)
    if config["mamba_proj_bias"]:
        shapes |= {f"{name}.bias": linear[name][:1] for name in linear}
    return shapes | {f"mamba.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}


def nemotron_h(config: Config, layer: int) -> Shapes:
    """Nemotron-H."""
    embed, dim, letter = config["hidden_size"], config["head_dim"], config["hybrid_override_pattern"][layer]
    if letter == "-":
        inner = config["intermediate_size"]
        linear: Shapes = {"mixer.up_proj": (inner, embed), "mixer.down_proj": (embed, inner)}
        return norm(embed, "norm") | weights(linear)
    if letter == "*":
        queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        linear = {f"mixer.{x}_proj": (size, embed) for x, size in (("q", queries), ("k", keys), ("v", keys))}
        return norm(embed, "norm") | weights({**linear, "mixer.o_proj": (embed, queries)})
    heads = config["mamba_num_heads"]
    inner = heads * config["mamba_head_dim"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    linear = {"mixer.in_proj": (inner + channels + heads, embed), "mixer.out_proj": (embed, inner)}
    shapes = norm(embed, "norm") | weights(linear) | norm(inner, "mixer.norm")
    shapes |= {"mixer.conv1d.weight": (channels, 1, config["conv_kernel"]), "mixer.conv1d.bias": (channels,)}
    return shapes | {f"mixer.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}


def qwen3_next(config: Config, layer: int) -> Shapes:
    """Qwen3-Next."""
    embed = config["hidden_size"]
    shapes = gated_delta(config, layer, lambda keys, values, heads: {"qkvz": 2 * (keys + values), "ba": 2 * heads})
    if layer in config["mlp_only_layers"]:
        return shapes | weights(gated("mlp", embed, config["intermediate_size"]))
    linear: Shapes = {"mlp.gate": (config["num_experts"], embed), "mlp.shared_expert_gate": (1, embed)}
    linear |= gated("mlp.shared_expert", embed, config["shared_expert_intermediate_size"])
    for expert in range(config["num_experts"]):
        linear |= gated(f"mlp.experts.{expert}", embed, config["moe_intermediate_size"])
    return shapes | weights(linear)


def qwen3_5(config: Config, layer: int) -> Shapes:
    """Qwen3.5 (text)."""
    shapes = gated_delta(
        config, layer, lambda keys, values, heads: {"qkv": 2 * keys + values, "z": values, "b": heads, "a": heads}
    )
    return shapes | weights(gated("mlp", config["hidden_size"], config["intermediate_size"]))


def gated_delta(config: Config, layer: int, inputs: Callable[[int, int, int], dict[str, int]]) -> Shapes:
    """A gated delta net, or gated attention between several; ``inputs`` of the one by the sizes of its keys and values
    and the number of its heads.
    """
    embed, dim = config["hidden_size"], config["head_dim"]
    shapes = norm(embed, "input_layernorm", "post_attention_layernorm")
    if layer % config["full_attention_interval"] == config["full_attention_interval"] - 1:
        queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        linear: Shapes = {f"self_attn.{x}_proj": (n, embed) for x, n in (("q", 2 * queries), ("k", keys), ("v", keys))}
        linear["self_attn.o_proj"] = (embed, queries)
        shapes |= norm(dim, "self_attn.q_norm", "self_attn.k_norm")
    else:
        heads, width = config["linear_num_value_heads"], config["linear_value_head_dim"]
        keys, values = config["linear_num_key_heads"] * config["linear_key_head_dim"], heads * width
        linear = {f"linear_attn.in_proj_{name}": (n, embed) for name, n in inputs(keys, values, heads).items()}
        linear["linear_attn.out_proj"] = (embed, values)
        shapes |= {f"linear_attn.{name}": (heads,) for name in ("A_log", "dt_bias")} | norm(width, "linear_attn.norm")
        shapes["linear_attn.conv1d.weight"] = (2 * keys + values, 1, config["linear_conv_kernel_dim"])
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


def qwen2_5_vision(config: Config) -> Shapes:
    """The encoder of Qwen2.5-VL, by whole names."""
    vision = config["vision_config"]
    hidden, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    wide = hidden * vision["spatial_merge_size"] ** 2
    linear: Shapes = {}
    for i in range(vision["depth"]):
        linear |= {
            f"visual.blocks.{i}.attn.qkv": (3 * hidden, hidden),
            f"visual.blocks.{i}.attn.proj": (hidden, hidden),
            f"visual.blocks.{i}.mlp.gate_proj": (inner, hidden),
            f"visual.blocks.{i}.mlp.up_proj": (inner, hidden),
            f"visual.blocks.{i}.mlp.down_proj": (hidden, inner),
        }
    linear |= {"visual.merger.mlp.0": (wide, wide), "visual.merger.mlp.2": (config["hidden_size"], wide)}
    norms = [f"visual.blocks.{i}.norm{n}" for i in range(vision["depth"]) for n in (1, 2)]
    return {
        **weights(linear),
        **{f"{name}.bias": shape[:1] for name, shape in linear.items()},
        **norm(hidden, *norms, "visual.merger.ln_q"),
        "visual.patch_embed.proj.weight": (hidden, 3, vision["temporal_patch_size"], side, side),
    }


def qwen3_5_vision(config: Config) -> Shapes:
    """The encoder of Qwen3.5, by whole names."""
    vision = config["vision_config"]
    hidden, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    wide = hidden * vision["spatial_merge_size"] ** 2
    linear: Shapes = {"merger.linear_fc1": (wide, wide), "merger.linear_fc2": (config["hidden_size"], wide)}
    for i in range(vision["depth"]):
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * hidden, hidden),
            f"blocks.{i}.attn.proj": (hidden, hidden),
            f"blocks.{i}.mlp.linear_fc1": (inner, hidden),
            f"blocks.{i}.mlp.linear_fc2": (hidden, inner),
        }
    norms = ["merger.norm", *(f"blocks.{i}.norm{n}" for i in range(vision["depth"]) for n in (1, 2))]
    shapes = {
        **weights(linear),
        **{f"{name}.bias": shape[:1] for name, shape in linear.items()},
        **norm(hidden, *norms),
        **{f"{name}.bias": (hidden,) for name in (*norms, "patch_embed.proj")},
        "patch_embed.proj.weight": (hidden, 3, vision["temporal_patch_size"], side, side),
        "pos_embed.weight": (vision["num_position_embeddings"], hidden),
    }
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def gemma3_vision(config: Config) -> Shapes:
    """The encoder of Gemma 3, by whole names."""
    vision = config["vision_config"]
    hidden, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    linear: Shapes = {}
    norms = ["post_layernorm"]
    for i in range(vision["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        linear |= {f"{layer}.self_attn.{x}_proj": (hidden, hidden) for x in ("q", "k", "v", "out")}
        linear |= {f"{layer}.mlp.fc1": (inner, hidden), f"{layer}.mlp.fc2": (hidden, inner)}
        norms += [f"{layer}.layer_norm{n}" for n in (1, 2)]
    shapes = {
        **weights(linear),
        **{f"{name}.bias": shape[:1] for name, shape in linear.items()},
        **norm(hidden, *norms),
        **{f"{name}.bias": (hidden,) for name in (*norms, "embeddings.patch_embedding")},
        "embeddings.patch_embedding.weight": (hidden, 3, side, side),
        "embeddings.position_embedding.weight": ((vision["image_size"] // side) ** 2, hidden),
    }
    return {
        **{f"vision_tower.vision_model.{name}": shape for name, shape in shapes.items()},
        "multi_modal_projector.mm_soft_emb_norm.weight": (hidden,),
        "multi_modal_projector.mm_input_projection_weight": (hidden, config["hidden_size"]),
    }


LAYERS: dict[str, Callable[[Config, int], Shapes]] = {
    "qwen2": llama,
    "qwen2_5_vl": llama,
    "qwen3": llama,
    "llama": llama,
    "mistral": llama,
    "smollm3": llama,
    "qwen2_moe": qwen_moe,
    "qwen3_moe": qwen_moe,
    "phi3": phi3,
    "olmo2": olmo,
    "olmo3": olmo,
    "glm4": glm4,
    "glm4_moe": glm4_moe,
    "granitemoehybrid": granite4,
    "gemma2": gemma3,
    "gemma3_text": gemma3,
    "gemma3": gemma3,
    "gemma4_text": gemma4,
    "gpt_oss": gpt_oss,
    "llama4_text": llama4,
    "bamba": bamba,
    "nemotron_h": nemotron_h,
    "qwen3_next": qwen3_next,
    "qwen3_5": qwen3_5,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
}

ENCODERS: dict[str, Callable[[Config], Shapes]] = {
    "qwen2_5_vl": qwen2_5_vision,
    "qwen3_5": qwen3_5_vision,
    "gemma3": gemma3_vision,
}
"""Tensors of the encoders of pictures, by whole names."""
