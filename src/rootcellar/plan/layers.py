"""From a Hugging Face config to what the KV cache stores of it: groups of layers, each of one kind that store the same.

Reads the spellings of the families below; what it does not know is refused rather than guessed at:

* layer by layer: ``layer_types`` (transformers from 4.53 on), ``layers_block_type``, ``hybrid_override_pattern``
  (Nemotron-H, whose layers mix tokens or are feed-forwards), ``attn_layer_indices``, ``attn_layer_period`` with
  ``attn_layer_offset`` (Jamba), ``full_attention_interval`` (Qwen3-Next);
* every n-th layer full: ``sliding_window_pattern`` (Gemma 3: 6, Cohere 2: 4, Gemma 2: 2), ``no_rope_layers`` and
  ``attention_chunk_size`` (Llama 4);
* ``sliding_window`` on all layers (Mistral), or from ``max_window_layers`` on (Qwen 2, when it is switched on).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rootcellar.cache.kind import RULES, Kind, Rule, chunked_local, full, recurrent, sliding_window
from rootcellar.errors import ConfigError
from rootcellar.plan.fields import Raw, text_of
from rootcellar.plan.stored import DTYPES, Heads, Latents, States, Stored


@dataclass(frozen=True, slots=True)
class Group:
    """The layers of one kind, and what each stores."""

    kind: Kind
    stored: Stored

    def token_bytes(self, kv_cache_dtype: str, tp: int = 1) -> int:
        """Bytes that one device stores of one token in all layers of the group; 0 for recurrent layers."""
        return len(self.kind.layers) * self.stored.token_bytes(kv_cache_dtype, tp)

    def state_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes that each device stores of one request in all layers, if they are recurrent; else 0."""
        return len(self.kind.layers) * self.stored.request_bytes(kv_cache_dtype)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the planner needs to know of a model.

    Attributes:
        groups: its layers by kind.
        text: the config of the language model (inside a multimodal one it is nested).
        dtype: of the weights, as the config says.
        context_length: ``max_position_embeddings``, or None.
    """

    groups: tuple[Group, ...]
    text: Raw
    dtype: str
    context_length: int | None

    @property
    def itemsize(self) -> int:
        """Bytes of an element of weights and activations."""
        return DTYPES.get(self.dtype, 2)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return sum(len(group.kind.layers) for group in self.groups)


def read_architecture(raw: Raw, *, window: int | None = None) -> Architecture:
    """The architecture that the content of ``config.json`` describes; ``window`` replaces the model's window or chunk.

    Raises ``ConfigError`` for a config whose layers it does not understand, ``ModelError`` for a field that holds what
    no model has.
    """
    text = text_of(raw)
    rules = layer_rules(text, window=window)
    groups = []
    for rule, span in dict.fromkeys(rules):
        layers = tuple(i for i, r in enumerate(rules) if r == (rule, span))
        if rule == "recurrent":
            groups.append(Group(recurrent("recurrent", layers), state_of(text)))
        elif rule == "sliding_window":
            groups.append(Group(sliding_window("window", layers, span), _attention(text)))
        elif rule == "chunked_local":
            groups.append(Group(chunked_local("chunk", layers, span), _attention(text)))
        else:
            groups.append(Group(full("full", layers), _attention(_of_full_layers(text))))
    if all(group.kind.rule == "recurrent" for group in groups):
        raise ConfigError("this model has no attention layers: a request costs the same whatever its length")
    groups.sort(key=lambda group: RULES.index(group.kind.rule))
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    context = text.get("max_position_embeddings")
    return Architecture(tuple(groups), text, dtype, None if context is None else int(context))


def layer_rules(text: Raw, *, window: int | None = None) -> list[tuple[Rule, int]]:
    """Rule and span (tokens; 0 where there is none) of each layer of a model; ``window`` replaces its window or chunk.

    The engine reads configs with this too. Raises ``ConfigError`` for layers that it does not understand.
    """
    spans = {"sliding_window": "sliding_window", "chunked_local": "attention_chunk_size"}
    rules = _rules(text, int(need(text, "num_hidden_layers")))
    return [(rule, (window or int(need(text, spans[rule]))) if rule in spans else 0) for rule in rules]


_LAYER_TYPES: Mapping[str, Rule] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding_window",
    "chunked_attention": "chunked_local",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "mamba2": "recurrent",
}

BESIDE = ("mlp", "moe")
"""Layers of their own that mix nothing, and so store nothing (Nemotron-H)."""
_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Letters of ``hybrid_override_pattern``."""

# Every n-th layer is full where a config does not say it: (model_type prefix, n).
_PATTERNS = (("gemma4", 6), ("gemma3", 6), ("gemma2", 2), ("cohere2", 4), ("gpt_oss", 2), ("olmo3", 4))


def layers_named(text: Raw) -> list[str]:
    """What each layer is by name, where a config says it of all; else nothing. ``ConfigError`` for a strange letter."""
    named = text.get("layer_types") or text.get("layers_block_type")
    if named or not (pattern := text.get("hybrid_override_pattern")):
        return list(named or ())
    if strange := sorted(set(pattern) - set(_PATTERN)):
        raise ConfigError(f"hybrid_override_pattern has {strange}; known letters: {', '.join(_PATTERN)}")
    return [_PATTERN[letter] for letter in pattern]


def _rules(text: Raw, count: int) -> list[Rule]:
    """The rule of each of ``count`` layers that mixes tokens."""
    named = layers_named(text)
    if named:
        unknown = sorted(set(named) - set(_LAYER_TYPES) - set(BESIDE))
        if unknown or len(named) < count:
            raise ConfigError(
                f"layer_types holds {unknown or len(named)}, the config has {count} layers; known types: "
                f"{', '.join(_LAYER_TYPES)}"
            )
        return _unless_switched_off(text, [_LAYER_TYPES[name] for name in named[:count] if name not in BESIDE])
    if text.get("attn_layer_indices") is not None:
        return _full_where(count, "recurrent", text["attn_layer_indices"])
    if text.get("attn_layer_period"):
        period, offset = int(text["attn_layer_period"]), int(text.get("attn_layer_offset") or 0)
        return ["full" if i % period == offset else "recurrent" for i in range(count)]
    if text.get("full_attention_interval"):
        return _every(int(text["full_attention_interval"]), count, "recurrent")
    strange = sorted(key for key in text if key.startswith(("mamba_", "ssm_", "linear_", "hybrid_override")))
    if strange:
        raise ConfigError(
            f"the config has {strange[0]!r} but does not say which layers are recurrent: give layer_types"
        )
    if text.get("attention_chunk_size"):
        ropes = text.get("no_rope_layers")  # 1: rotary and chunked, 0: neither
        if ropes:
            return ["chunked_local" if rope else "full" for rope in ropes[:count]]
        return _every(int(text.get("no_rope_layer_interval") or 4), count, "chunked_local")
    return _windowed(text, count)


def _windowed(text: Raw, count: int) -> list[Rule]:
    model_type = str(text.get("model_type") or "")
    # Qwen writes a window into every config, and switches it on apart.
    if not text.get("sliding_window") or not text.get("use_sliding_window", not model_type.startswith("qwen")):
        return ["full"] * count
    pattern = next((n for prefix, n in _PATTERNS if model_type.startswith(prefix)), 0)
    pattern = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or pattern)
    if pattern:
        return _every(pattern, count, "sliding_window")
    if text.get("max_window_layers") is not None:  # Qwen: the first layers see everything
        first = int(text["max_window_layers"])
        return ["full" if i < first else "sliding_window" for i in range(count)]
    return ["sliding_window"] * count


def _unless_switched_off(text: Raw, rules: list[Rule]) -> list[Rule]:
    """Sliding layers without a window see everything."""
    if text.get("sliding_window"):
        return rules
    return ["full" if rule == "sliding_window" else rule for rule in rules]


def _every(n: int, count: int, other: Rule) -> list[Rule]:
    """Layers n, 2n, ... (counted from 1) are full."""
    return ["full" if (i + 1) % n == 0 else other for i in range(count)]


def _full_where(count: int, other: Rule, indices: Sequence[int]) -> list[Rule]:
    wanted = set(indices)
    return ["full" if i in wanted else other for i in range(count)]


def head_dim(text: Raw) -> int:
    """Elements of a head."""
    given = text.get("head_dim")
    return int(given) if given else int(need(text, "hidden_size")) // int(need(text, "num_attention_heads"))


def latent(text: Raw) -> bool:
    """Whether the attention layers of the model store latents."""
    return bool(text.get("kv_lora_rank"))


def _attention(text: Raw) -> Stored:
    if latent(text):
        return Latents(int(text["kv_lora_rank"]), int(need(text, "qk_rope_head_dim")))
    heads = int(need(text, "num_attention_heads"))
    kv_heads = kv_heads_of(text)
    return Heads(kv_heads, head_dim(text), heads // kv_heads)


def _of_full_layers(text: Raw) -> Raw:
    """The config with the heads of its full layers, where they have others (Gemma 4)."""
    if not text.get("global_head_dim"):
        return text
    heads = text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None
    return {**text, "head_dim": text["global_head_dim"], "num_key_value_heads": heads or kv_heads_of(text)}


def kv_heads_of(text: Raw) -> int:
    """KV heads of a layer that attends by head."""
    return int(text.get("num_key_value_heads") or need(text, "num_attention_heads"))


def state_of(text: Raw) -> States:
    """Of a recurrent layer: Mamba 2 (Dao and Gu, 2024), Mamba 1 (Gu and Dao, 2023), gated delta (Yang et al., 2024)."""
    if text.get("linear_num_value_heads"):
        key = int(need(text, "linear_key_head_dim"))
        keys = int(need(text, "linear_num_key_heads")) * key
        heads, width = int(text["linear_num_value_heads"]), int(need(text, "linear_value_head_dim"))
        return States((int(need(text, "linear_conv_kernel_dim")) - 1, heads * width + 2 * keys), (heads, key, width))
    if text.get("mamba_num_heads"):  # Nemotron-H's names
        heads, width, size = (
            int(text["mamba_num_heads"]),
            int(need(text, "mamba_head_dim")),
            need(text, "ssm_state_size"),
        )
        channels = heads * width + 2 * int(text.get("n_groups") or 1) * int(size)
        return States((int(need(text, "conv_kernel")) - 1, channels), (heads * width, int(size)))
    inner = int(need(text, "hidden_size")) * int(need(text, "mamba_expand"))
    size, taps = int(need(text, "mamba_d_state")), int(need(text, "mamba_d_conv")) - 1
    if text.get("mamba_n_heads"):
        heads = int(text["mamba_n_heads"])
        given = text.get("mamba_d_head")
        inner = inner if given in (None, "auto") else heads * int(given or 0)
        return States((taps, inner + 2 * size * int(text.get("mamba_n_groups") or 1)), (inner, size))
    return States((taps, inner), (inner, size))


def need(text: Raw, name: str) -> Any:
    """A field of the config; ``ConfigError`` names it when it is missing."""
    if text.get(name) is None:
        raise ConfigError(f"the config lacks {name!r}, which the planner needs")
    return text[name]
