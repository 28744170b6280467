"""Model folders for tests: Hugging Face layout, made from a numpy seed in milliseconds, without torch.

    make_checkpoint("qwen3", tmp_path, num_key_value_heads=1, seed=3, tokenizer=True)   -> the folder

Weights are drawn tensor by tensor from (seed, tensor name), so every program that has numpy makes the same ones: the
golden files in ``tests/golden`` hold what transformers answered for them (``scripts/make_golden.py``), and ``golden()``
reads one back. Scales are chosen so that greedy text wanders and its two best tokens lie well apart.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from checkpoint_layers import ENCODERS, LAYERS
from vocabularies import write_byte_level

GOLDEN = Path(__file__).parent / "golden"

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": ...,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
}
EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
NARROW: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
MAMBA: dict[str, Any] = {
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
SPARSE: dict[str, Any] = {
    **NARROW,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-5-vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "image_token_id": 500,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 3,
            "hidden_size": 64,
            "out_hidden_size": 256,
            "intermediate_size": 96,
            "num_heads": 2,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6, "head_dim": 128},
    "llama2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **NARROW,
        "num_hidden_layers": 6,
        "hidden_act": ...,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 24,
        "sliding_window_pattern": 6,
    },
    "gemma3-seeing": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        **NARROW,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "hidden_act": ...,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 24,
        "image_token_index": 500,
        "boi_token_index": 501,
        "eoi_token_index": 502,
        "mm_tokens_per_image": 16,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "num_channels": 3,
            "image_size": 56,
            "patch_size": 7,
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **NARROW,
        "hidden_act": ...,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 20.0,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **NARROW,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 1.5,
    },
    "llama4": {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        **NARROW,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "intermediate_size_mlp": 192,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 32,
        "floor_scale": 16,
        "attn_scale": 0.5,
        "rope_theta": 500000.0,
    },
    "bamba": {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        **NARROW,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        **MAMBA,
    },
    "qwen3-next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **NARROW,
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "qwen3-5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        **NARROW,
        "head_dim": 64,
        "num_hidden_layers": 4,
        "rope_theta": ...,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
        "full_attention_interval": 4,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "image_token_id": 500,
        "video_token_id": 503,
        "vision_start_token_id": 501,
        "vision_end_token_id": 502,
        "vision_config": {
            "model_type": "qwen3_5_vision",
            "depth": 2,
            "hidden_size": 64,
            "out_hidden_size": 128,
            "intermediate_size": 96,
            "num_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 36,
        },
    },
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **SPARSE,
        "shared_expert_intermediate_size": 96,
        "norm_topk_prob": False,
    },
    "qwen3-moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **SPARSE},
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **NARROW,
        "head_dim": ...,
        "partial_rotary_factor": 0.75,
        "pad_token_id": 0,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **NARROW,
        "no_rope_layers": [1, 0],
        "pad_token_id": 0,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", **NARROW},
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "rope_theta": 500000.0,
        **NARROW,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "glm4": {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "pad_token_id": 0,
        **NARROW,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "glm4-moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **NARROW,
        **EXPERTS,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "granite4": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        **NARROW,
        "intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
        **MAMBA,
        "mamba_n_groups": 1,
        "position_embedding_type": "nope",
        "shared_intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.8,
    },
    "deepseek2": {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **LATENT, **EXPERTS},
    "deepseek3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **LATENT,
        **EXPERTS,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
"""What each family's ``config.json`` says beyond ``COMMON``, in the spelling of transformers before version 5."""


def make_checkpoint(
    family: str,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write a model folder and return it.

    ``overrides`` are fields of ``config.json``. ``shards`` > 1 writes an index and that many files. ``tokenizer`` adds
    a byte-level BPE tokenizer of ``vocab_size`` with a chat template, whose end-of-turn token becomes the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, **overrides)
    if tokenizer:
        config["eos_token_id"] = write_byte_level(folder, config["vocab_size"])
    config["torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(nested(config), indent=1))
    if (processor := PROCESSORS.get(config["model_type"])) is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {name: array.astype(kind) for name, array in make_tensors(config, seed).items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[index::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def make_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The ``config.json`` of a family with ``overrides``; a field that is ``...`` is left out."""
    fields = {**COMMON, **FAMILIES[family], **overrides}
    return {name: value for name, value in fields.items() if value is not ...}


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """A config as its family writes it: where that is known in one form alone, what is of the text lies apart."""
    if config["model_type"] not in PREFIXES:
        return config
    names = ("architectures", "model_type", "torch_dtype", "mm_tokens_per_image")
    outside = {n: v for n, v in config.items() if n in names or "_token_id" in n or "_token_index" in n}
    text = {n: v for n, v in config.items() if n not in outside and n != "vision_config"}
    outside |= {n: v for n, v in config.items() if n in ("vision_config", "tie_word_embeddings")}
    return {**outside, "text_config": {"model_type": f"{config['model_type']}_text", **text}}


PREFIXES = {"qwen3_5": "model.language_model.", "gemma3": "language_model.model."}
"""What stands before a language model's tensors inside a multimodal one."""
PROCESSORS = {
    "qwen3_5": {
        "size": {"shortest_edge": 64 * 64, "longest_edge": 160 * 160},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": 16,
    },
    "gemma3": {"size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}
"""``preprocessor_config.json``, where the defaults are no good for small pictures."""
HEADS = {"gemma3": "language_model.lm_head.weight"}
LAST_NORMS = {"bamba": "model.final_layernorm.weight"}
"""Of the architectures that do not call it ``model.norm``."""


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    embed, prefix = config["hidden_size"], PREFIXES.get(config["model_type"], "model.")
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (config["vocab_size"], embed),
        LAST_NORMS.get(config["model_type"], f"{prefix}norm.weight"): (embed,),
    }
    if not config["tie_word_embeddings"]:
        shapes[HEADS.get(config["model_type"], "lm_head.weight")] = (config["vocab_size"], embed)
    for layer in range(config["num_hidden_layers"]):
        here = LAYERS[config["model_type"]](config, layer)
        shapes |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in here.items()}
    if (encoder := ENCODERS.get(config["model_type"])) is not None:
        shapes |= encoder(config)
    return shapes


def make_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors of a checkpoint, each a function of the seed and its own name."""

    gemma = config["model_type"].startswith("gemma")  # norms around zero, embeddings that it scales up

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = random.standard_normal(shape, dtype=np.float32)
        if "norm" in name or "ln_q" in name:
            return (0 if gemma and not name.startswith("vision_tower") else 1) + 0.1 * values
        if name.endswith("sinks"):
            return values
        if name.endswith(".D"):
            return 1 + 0.1 * values
        if name.endswith(".A_log"):
            return values - 2  # slow to forget: a wrong state shows long after
        if name.endswith("bias"):
            return 0.2 * values
        if "embed" in name or "lm_head" in name:
            return (0.07 if gemma and "embed" in name else 0.25) * values
        inputs = math.prod(shape[1:]) if len(shape) > 3 else shape[1]  # a convolution over patches
        return values * np.float32(1.5 / inputs**0.5)

    return {name: draw(name, shape) for name, shape in tensor_shapes(config).items()}


@dataclass(frozen=True)
class Golden:
    """A checkpoint and what transformers answered: greedy tokens and the log-probability of every prompt token.

    ``logprobs[i][j]`` is that of ``prompts[i][j + 1]`` given the tokens before it.
    """

    name: str
    family: str
    seed: int
    overrides: dict[str, Any]
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]

    def make(self, folder: str | Path) -> Path:
        """Write its checkpoint."""
        return make_checkpoint(self.family, folder, seed=self.seed, **self.overrides)


def golden_names() -> list[str]:
    """The names of the golden files."""
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def golden(name: str) -> Golden:
    """Read one golden file."""
    return Golden(name=name, **json.loads((GOLDEN / f"{name}.json").read_text()))


@dataclass(frozen=True)
class GoldenPictures:
    """A checkpoint with an encoder of pictures, and what transformers answered to prompts with some.

    A prompt has one token where each of its pictures is to be; ``pictures``: seed, height and width of each of them
    (see ``picture``). ``logprobs[i]`` is of the prompt as it is computed, each picture's token as often as it has
    vectors: None for those.
    """

    name: str
    family: str
    seed: int
    overrides: dict[str, Any]
    prompts: list[list[int]]
    pictures: list[list[list[int]]]
    tokens: list[list[int]]
    logprobs: list[list[float | None]]

    def make(self, folder: str | Path) -> Path:
        """Write its checkpoint."""
        return make_checkpoint(self.family, folder, seed=self.seed, **self.overrides)


def golden_pictures(name: str) -> GoldenPictures:
    """Read one golden file of those with pictures."""
    return GoldenPictures(name=name, **json.loads((GOLDEN / "pictures" / f"{name}.json").read_text()))


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A picture of large and small things: uint8 [height, width, 3]."""
    random = np.random.default_rng([seed, height, width])
    rough = random.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3))
    smooth = np.repeat(np.repeat(rough, 20, 0), 20, 1)[:height, :width]
    return np.clip(smooth + random.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)
