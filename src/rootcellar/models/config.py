"""What a model is: its sizes and switches, read from a Hugging Face folder's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rootcellar.errors import ModelError
from rootcellar.models.families import Family, family_of
from rootcellar.models.rope import RopeConfig, read_rope

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one dense decoder; hashable, so it can be a static argument of a jitted function.

    ``num_heads`` query heads share ``num_kv_heads`` key/value heads, each of ``head_dim``; query head ``h`` reads
    key/value head ``h // (num_heads // num_kv_heads)``.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "float32"
    """The dtype that the checkpoint was saved in, as ``config.json`` says (one of ``DTYPES``); loading may differ."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position_embeddings"):
            value = vars(self)[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype={self.dtype!r} is not supported; known: {', '.join(DTYPES)}")
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs")

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have: ``max_position_embeddings``, stretched where rope scaling stretches it.

        ``linear`` and ``dynamic`` count from ``max_position_embeddings``, ``yarn`` from the original context; in
        ``llama3`` configs ``max_position_embeddings`` is the stretched context already.
        """
        rope = self.rope
        if rope.type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * rope.factor)
        if rope.type == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max * rope.factor))
        return self.max_position_embeddings

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


def load_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json``, and ``generation_config.json`` where there is one, of a Hugging Face model folder.

    End-of-text ids come from ``generation_config.json`` where it names any, else from ``config.json``: what
    transformers' ``generate`` stops at. Raises ``ModelError`` for a missing folder or file, an unknown architecture,
    a missing field, and for features that would silently give other results (sliding windows, quantised weights).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no model folder {str(folder)!r}: give a folder with config.json and *.safetensors in it")
    raw = read_json(folder / "config.json")
    if raw is None:
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    generation = read_json(folder / "generation_config.json") or {}
    try:
        return read_config(raw, generation)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Turn the content of ``config.json`` (and of ``generation_config.json``) into a ``ModelConfig``.

    Understands the spelling of transformers before version 5 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and
    from 5 on (``rope_parameters``, ``dtype``). Raises ``ModelError`` as ``load_config`` does.
    """
    family = family_of(raw)
    _refuse_unsupported(raw, family)
    num_heads = _need(raw, "num_attention_heads")
    hidden_size = _need(raw, "hidden_size")
    context = _need(raw, "max_position_embeddings")
    eos = (generation or {}).get("eos_token_id")
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=_need(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_need(raw, "intermediate_size"),
        num_layers=_need(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_given(raw, "num_key_value_heads", num_heads),
        head_dim=_given(raw, "head_dim", family.head_dim or hidden_size // num_heads),
        rms_norm_eps=float(_given(raw, "rms_norm_eps", 1e-6)),
        rope=read_rope(raw, context),
        max_position_embeddings=context,
        tie_word_embeddings=bool(_given(raw, "tie_word_embeddings", False)),
        eos_token_ids=_ids(raw.get("eos_token_id") if eos is None else eos),
        bos_token_id=next(iter(_ids(raw.get("bos_token_id"))), None),
        dtype=str(_given(raw, "dtype", _given(raw, "torch_dtype", "float32"))).removeprefix("torch."),
        **family.switches(raw),
    )


def _refuse_unsupported(raw: Mapping[str, Any], family: Family) -> None:
    """Raise for what the dense decoder would compute otherwise than the checkpoint means."""
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise ModelError(f"quantised weights ({method}) are not supported; use the float checkpoint of this model")
    if _given(raw, "hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act={raw['hidden_act']!r} is not supported; known: 'silu'")
    kinds = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        raise ModelError(f"layer_types holds {kinds}; only 'full_attention' layers are supported")
    if raw.get("sliding_window") and _given(raw, "use_sliding_window", family.windowed):
        raise ModelError(f"sliding_window={raw['sliding_window']} is not supported; only full attention is")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _need(raw: Mapping[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ModelError(f"the field {name!r} is missing")
    return raw[name]


def _given(raw: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field that may be absent or null."""
    value = raw.get(name)
    return default if value is None else value


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids of a field that may hold one, several or none."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)
