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

from checkpoint_configs import COMMON, FAMILIES, PROCESSORS
from checkpoint_layers import ENCODERS, LAYERS
from vocabularies import write_byte_level

GOLDEN = Path(__file__).parent / "golden"


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
HEADS = {"gemma3": "language_model.lm_head.weight"}
LAST_NORMS = {"bamba": "model.final_layernorm.weight", "nemotron_h": "backbone.norm_f.weight"}
"""Of the architectures that do not call it ``model.norm``."""
EMBEDDINGS = {"nemotron_h": "backbone.embeddings.weight"}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    embed, kind = config["hidden_size"], config["model_type"]
    prefix = "backbone." if kind in EMBEDDINGS else PREFIXES.get(kind, "model.")
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDINGS.get(kind, f"{prefix}embed_tokens.weight"): (config["vocab_size"], embed),
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

    gemma = config["model_type"].startswith("gemma")  # embeddings that it scales up
    around_zero = gemma and config["model_type"] != "gemma4_text"  # its norms

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = random.standard_normal(shape, dtype=np.float32)
        if "norm" in name or "ln_q" in name:
            return (0 if around_zero and not name.startswith("vision_tower") else 1) + 0.1 * values
        if name.endswith("sinks"):
            return values
        if name.endswith((".D", "layer_scalar")):
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
