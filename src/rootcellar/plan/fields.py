"""What a model's ``config.json`` may hold: the type and the limits of every field that is read anywhere.

A config comes from strangers. It is checked here once, before anything else reads it, so that whoever reads a field
afterwards may trust it: what is there is of the right type and within limits that no real model comes near, and null is
the same as absent. Fields without a row in ``FIELDS`` are read by nobody.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rootcellar.errors import ModelError

Raw = Mapping[str, Any]

MOST_LAYERS = 512
MOST_EXPERTS = 1024
MOST_IDS = 1024
LONGEST_CONTEXT = 2**27
"""Tokens: thirteen times the longest that a published config names."""
_WIDEST = 2**20
_LONGEST_WORD = 200
_MOST_PAIRS = 1024


class Field(Protocol):
    """What a field may hold. ``said`` ends the sentence "it must be ..."."""

    @property
    def said(self) -> str:
        """What is allowed, in words."""
        ...

    def allows(self, value: Any) -> bool:
        """Whether ``value``, which is not None, is allowed."""
        ...


@dataclass(frozen=True)
class Whole:
    """An integer from ``low`` to ``high``; ``word``: a string that is allowed as well."""

    low: int
    high: int
    word: str | None = None

    @property
    def said(self) -> str:
        """See ``Field``."""
        least = f"a whole number of at least {self.low} and at most {self.high:,}"
        return least if self.word is None else f"{self.word!r} or {least}"

    def allows(self, value: Any) -> bool:
        """See ``Field``."""
        if self.word is not None and value == self.word:
            return True
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``; ``above``: more than ``low``."""

    low: float
    high: float
    above: bool = False

    @property
    def said(self) -> str:
        """See ``Field``."""
        return f"a number {'above' if self.above else 'of at least'} {self.low:g} and at most {self.high:g}"

    def allows(self, value: Any) -> bool:
        """See ``Field``. Comparing is exact for integers of any size, and false for NaN."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)


@dataclass(frozen=True)
class Flag:
    """True or false; also 0, and what other numbers up to ``most`` some configs write for true, or one ``word``."""

    most: int = 1
    word: str | None = None
    said: str = "true or false"

    def allows(self, value: Any) -> bool:
        """See ``Field``."""
        return (self.word is not None and value == self.word) or (isinstance(value, int) and 0 <= value <= self.most)


@dataclass(frozen=True)
class Word:
    """A short string."""

    said: str = f"a string of at most {_LONGEST_WORD} characters"

    def allows(self, value: Any) -> bool:
        """See ``Field``."""
        return isinstance(value, str) and len(value) <= _LONGEST_WORD


@dataclass(frozen=True)
class Several:
    """A list of at most ``most`` entries that ``each`` allows; ``one``: or such an entry by itself."""

    each: Field
    most: int
    one: bool = False

    @property
    def said(self) -> str:
        """See ``Field``."""
        several = f"a list of at most {self.most:,} entries, each {self.each.said}"
        return f"{self.each.said}, or {several}" if self.one else several

    def allows(self, value: Any) -> bool:
        """See ``Field``."""
        if self.one and self.each.allows(value):
            return True
        return isinstance(value, list | tuple) and len(value) <= self.most and all(map(self.each.allows, value))


@dataclass(frozen=True)
class StepLimit:
    """``time_step_limit``: two numbers, of which transformers 5 writes infinity as an object."""

    said: str = "a list of two numbers"

    def allows(self, value: Any) -> bool:
        """See ``Field``."""
        if not isinstance(value, list | tuple) or len(value) not in (0, 2):
            return False
        return all(
            limit == {"__float__": "Infinity"}
            or (isinstance(limit, int | float) and not isinstance(limit, bool) and not math.isnan(limit))
            for limit in value
        )


@dataclass(frozen=True)
class Object:
    """An object; ``fields`` are those that are read of it, ``nested``: objects inside it that hold the same."""

    fields: Mapping[str, Field]
    nested: tuple[str, ...] = ()
    said: str = "an object"

    def allows(self, value: Any) -> bool:
        """See ``Field``; its fields are another question (``check_fields`` names them by their own)."""
        return isinstance(value, Mapping)


_SIZE = Whole(1, _WIDEST)
_COUNT = Whole(0, _WIDEST)
_TOKENS = Whole(1, LONGEST_CONTEXT)
_LAYER = Whole(0, MOST_LAYERS)
_EVERY = Whole(1, MOST_LAYERS)
_SCALE = Number(0, 1e6, above=True)
_THETA = Number(1, 1e15, above=True)
_IDS = Several(Whole(0, 2**31 - 1), MOST_IDS, one=True)
_LAYERS = Several(Whole(0, MOST_LAYERS), MOST_LAYERS)
_EXPERTS = Whole(1, MOST_EXPERTS)

_ROPE: Mapping[str, Field] = {
    "rope_type": Word(),
    "type": Word(),
    "rope_theta": _THETA,
    "partial_rotary_factor": Number(0, 1, above=True),
    "factor": _SCALE,
    "original_max_position_embeddings": _TOKENS,
    "low_freq_factor": _SCALE,
    "high_freq_factor": _SCALE,
    "beta_fast": _SCALE,
    "beta_slow": _SCALE,
    "truncate": Flag(),
    "attention_factor": _SCALE,
    "short_factor": Several(_SCALE, _MOST_PAIRS),
    "long_factor": Several(_SCALE, _MOST_PAIRS),
    "mscale": Number(0, 1e6),
    "mscale_all_dim": Number(0, 1e6),
    "mrope_section": Several(Whole(0, 1024), 3),
    "mrope_interleaved": Flag(),
}
_ROPES = Object(_ROPE, nested=("full_attention", "sliding_attention"))

_VISION: Mapping[str, Field] = {
    "depth": Whole(1, MOST_LAYERS),
    "hidden_size": _SIZE,
    "out_hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_heads": _SIZE,
    "in_channels": Whole(1, 64),
    "in_chans": Whole(1, 64),
    "patch_size": Whole(1, 256),
    "spatial_merge_size": Whole(1, 16),
    "temporal_patch_size": Whole(1, 16),
    "num_position_embeddings": _SIZE,
    "num_hidden_layers": Whole(1, MOST_LAYERS),
    "num_attention_heads": _SIZE,
    "num_channels": Whole(1, 64),
    "image_size": Whole(1, 2**14),
    "layer_norm_eps": Number(0, 1),
    "deepstack_visual_indexes": _LAYERS,
    "window_size": Whole(1, 4096),
    "fullatt_block_indexes": _LAYERS,
    "hidden_act": Word(),
    "rope_parameters": Object({"rope_theta": _THETA}),
}
_PIXELS = Whole(1, 2**31)
PROCESSOR: Mapping[str, Field] = {
    "min_pixels": _PIXELS,
    "max_pixels": _PIXELS,
    "size": Object({"shortest_edge": _PIXELS, "longest_edge": _PIXELS, "height": _PIXELS, "width": _PIXELS}),
    "do_pan_and_scan": Flag(),
    "image_mean": Several(Number(0, 1), 3),
    "image_std": Several(Number(0, 1, above=True), 3),
}
"""What is read of ``preprocessor_config.json``: how a model's pictures are resized."""

FIELDS: Mapping[str, Field] = {
    # which model it is
    "architectures": Several(Word(), 100),
    "model_type": Word(),
    "dtype": Word(),
    "torch_dtype": Word(),
    "quantization_config": Object({"quant_method": Word()}),
    "bos_token_id": _IDS,
    "eos_token_id": _IDS,
    "tie_word_embeddings": Flag(),
    # its sizes
    "vocab_size": Whole(1, 2**24),
    "hidden_size": _SIZE,
    "num_hidden_layers": Whole(1, MOST_LAYERS),
    "max_position_embeddings": _TOKENS,
    "rms_norm_eps": Number(0, 1),
    "layer_norm_epsilon": Number(0, 1),
    "intermediate_size": _SIZE,
    "intermediate_size_mlp": _SIZE,
    "hidden_act": Word(),
    "hidden_activation": Word(),
    "mlp_hidden_act": Word(),
    "mlp_bias": Flag(),
    "final_logit_softcapping": _SCALE,
    "embedding_multiplier": _SCALE,
    "residual_multiplier": _SCALE,
    "logits_scaling": _SCALE,
    # attention
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "attention_head_dim": _SIZE,
    "global_head_dim": _SIZE,
    "num_global_key_value_heads": _SIZE,
    "attention_k_eq_v": Flag(),
    "num_kv_shared_layers": _LAYER,
    "hidden_size_per_layer_input": _COUNT,
    "enable_moe_block": Flag(),
    "attention_bias": Flag(),
    "qkv_bias": Flag(),
    "attention_multiplier": _SCALE,
    "position_embedding_type": Word(),
    "query_pre_attn_scalar": _SCALE,
    "attn_logit_softcapping": Number(0, 1e6),
    "use_bidirectional_attention": Flag(word="vision"),
    "use_qk_norm": Flag(),
    "attn_temperature_tuning": Flag(most=4),  # as early configs of Llama 4 have it
    "floor_scale": Number(0, LONGEST_CONTEXT, above=True),
    "attn_scale": Number(0, 1e6),
    "q_lora_rank": _COUNT,
    "kv_lora_rank": _COUNT,
    "qk_nope_head_dim": _SIZE,
    "qk_rope_head_dim": _SIZE,
    "v_head_dim": _SIZE,
    # pictures
    "vision_config": Object(_VISION),
    "image_token_id": Whole(0, 2**31 - 1),
    **dict.fromkeys(
        ("boi_token_index", "eoi_token_index", "vision_start_token_id", "vision_end_token_id", "video_token_id"),
        Whole(0, 2**31 - 1),
    ),
    "image_token_index": Whole(0, 2**31 - 1),
    "mm_tokens_per_image": _SIZE,
    "image_processor": Object(PROCESSOR),  # what is read of preprocessor_config.json
    # which layers see what
    "layer_types": Several(Word(), MOST_LAYERS),
    "layers_block_type": Several(Word(), MOST_LAYERS),
    "hybrid_override_pattern": Word(),
    "attn_layer_indices": _LAYERS,
    "attn_layer_period": _LAYER,
    "attn_layer_offset": _LAYER,
    "full_attention_interval": _LAYER,
    "sliding_window": Whole(0, LONGEST_CONTEXT),
    "use_sliding_window": Flag(),
    "sliding_window_pattern": _LAYER,
    "_sliding_window_pattern": _LAYER,
    "max_window_layers": Whole(0, 2**31 - 1),
    "attention_chunk_size": Whole(0, LONGEST_CONTEXT),
    "no_rope_layers": _LAYERS,
    "no_rope_layer_interval": _EVERY,
    # rotary embeddings
    "rope_theta": _THETA,
    "rope_local_base_freq": _THETA,
    "rope_scaling": _ROPES,
    "rope_parameters": _ROPES,
    "rope_interleave": Flag(),
    "partial_rotary_factor": Number(0, 1, above=True),
    "original_max_position_embeddings": _TOKENS,
    # experts
    "n_routed_experts": _EXPERTS,
    "num_local_experts": Whole(0, MOST_EXPERTS),
    "num_experts": Whole(0, MOST_EXPERTS),
    "num_experts_per_tok": _EXPERTS,
    "n_shared_experts": Whole(0, MOST_EXPERTS),
    "n_group": _EXPERTS,
    "topk_group": _EXPERTS,
    "topk_method": Word(),
    "scoring_func": Word(),
    "norm_topk_prob": Flag(),
    "routed_scaling_factor": _SCALE,
    "moe_intermediate_size": _SIZE,
    "shared_expert_intermediate_size": _COUNT,
    "shared_intermediate_size": _COUNT,
    "first_k_dense_replace": _LAYER,
    "moe_layer_freq": _EVERY,
    "moe_layers": _LAYERS,
    "interleave_moe_layer_step": _EVERY,
    "expert_layer_period": _EVERY,
    "decoder_sparse_step": _EVERY,
    "mlp_only_layers": _LAYERS,
    "swiglu_alpha": _SCALE,
    "swiglu_limit": _SCALE,
    # recurrent layers
    "mamba_n_heads": _SIZE,
    "mamba_d_head": Whole(1, _WIDEST, word="auto"),
    "mamba_n_groups": _SIZE,
    "mamba_d_state": _SIZE,
    "mamba_d_conv": Whole(1, 64),
    "mamba_expand": Whole(1, 64),
    "mamba_conv_bias": Flag(),
    "mamba_proj_bias": Flag(),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"), _SIZE),
    "conv_kernel": Whole(1, 64),
    "use_conv_bias": Flag(),
    "use_bias": Flag(),
    "time_step_limit": StepLimit(),
    "linear_num_value_heads": _SIZE,
    "linear_num_key_heads": _SIZE,
    "linear_key_head_dim": _SIZE,
    "linear_value_head_dim": _SIZE,
    "linear_conv_kernel_dim": Whole(1, 64),
}
"""Every field that is read of a config, or of the ``text_config`` inside it, and what it may hold."""


def text_of(raw: Raw) -> Raw:
    """The config of the language model: the object ``text_config`` of a multimodal model, laid over what is outside.

    Raises ``ModelError`` as ``check_fields`` does, for both.
    """
    if not isinstance(raw, Mapping):
        raise ModelError(f"a config must be an object, not {reprlib.repr(raw)}")
    check_fields(raw)
    nested = raw.get("text_config")
    if nested is None:
        return raw
    if not isinstance(nested, Mapping):
        raise _wrong("text_config", nested, "an object")
    check_fields(nested, inside="text_config.")
    return {**raw, **nested}


def check_fields(raw: Raw, inside: str = "", fields: Mapping[str, Field] = FIELDS) -> None:
    """Raise ``ModelError`` for a field that holds what no model has; ``inside`` stands before its name."""
    for name, value in raw.items():
        field = fields.get(name)
        if field is None or value is None:
            continue
        if not field.allows(value):
            raise _wrong(f"{inside}{name}", value, field.said)
        if isinstance(field, Object):
            check_fields(value, f"{inside}{name}.", field.fields)
            parts = {part: Object(field.fields) for part in field.nested}
            if parts:
                check_fields(value, f"{inside}{name}.", parts)


def _wrong(name: str, value: Any, said: str) -> ModelError:
    return ModelError(f"{name} must be {said}, not {reprlib.repr(value)}")
