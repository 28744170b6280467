"""Model folders for tests: Hugging Face layout, made from a numpy seed in milliseconds, without torch.

    make_checkpoint("qwen3", tmp_path, num_key_value_heads=1, seed=3, tokenizer=True)   -> the folder

Weights are drawn tensor by tensor from (seed, tensor name), so every program that has numpy makes the same ones: the
golden files in ``tests/golden`` hold what transformers answered for them (``scripts/make_golden.py``), and ``golden()``
reads one back. Scales are chosen so that greedy text wanders and its two best tokens lie well apart.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from checkpoint_layers import LAYERS
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
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6, "head_dim": 128},
    "llama2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
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
    (folder / "config.json").write_text(json.dumps(config, indent=1))
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


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    embed = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], embed),
        "model.norm.weight": (embed,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], embed)
    for layer in range(config["num_hidden_layers"]):
        here = LAYERS[config["model_type"]](config, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in here.items()}
    return shapes


def make_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors of a checkpoint, each a function of the seed and its own name."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = random.standard_normal(shape, dtype=np.float32)
        if "norm" in name:
            return 1 + 0.1 * values
        if name.endswith("bias"):
            return 0.2 * values
        if "embed" in name or "lm_head" in name:
            return 0.25 * values
        return values * np.float32(1.5 / shape[1] ** 0.5)

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
