"""Which fields a body may have: no field that a client sends is dropped in silence.

What a route's model declares is done. What changes nothing is listed here with the reason, and taken. What would change
the answer and is not supported is listed here too, and refused by name, unless its value asks for nothing. Any other
name is refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rootcellar.server.errors import invalid


@dataclass(frozen=True)
class Refused:
    """A field that is not supported. ``instead``: what to do; ``nothing``: values, beside null, that ask for none."""

    instead: str
    nothing: tuple[Any, ...] = ()


def known(
    given: Mapping[str, Any], names: Iterable[str], ignored: Iterable[str], refused: Mapping[str, Refused]
) -> Any:
    """``given`` without what changes nothing; ``ApiError`` 400 for the first field that is refused or unknown.

    Args:
        given: what a client sent.
        names: the fields that are done.
        ignored: those that change nothing.
        refused: those that are not supported.
    """
    kept = {}
    for name, value in given.items():
        if name in names:
            kept[name] = value
        elif name in ignored:
            continue
        elif name not in refused:
            name = name[:100]
            near = difflib.get_close_matches(name.lower(), names, n=1)
            told = f"Did you mean {near[0]!r}?" if near else "Leave it out: docs/fields.md lists what there is."
            raise invalid(f"unknown field {name!r}. {told}", name)
        elif value is not None and not any(_same(value, nothing) for nothing in refused[name].nothing):
            raise invalid(f"{name} is not supported: {refused[name].instead}", name)
    return kept


_TORCH = "how torch keeps its memory"

CONTROL_IGNORED: Mapping[str, str] = {
    "torch_empty_cache": _TORCH,
    "recapture_cuda_graph": _TORCH,
    "is_async": "how SGLang's scheduler waits; requests go on over the KV that they have",
    "keep_pause": "whether a pause ends with the update; here it lasts until it is undone",
    "token_step": "a label for the operator's records",
    "finished_reason": "what SGLang's own processes tell each other",
    "abort_message": "what SGLang's own processes tell each other",
}
"""The same for the bodies of control."""

CONTROL_REFUSED: Mapping[str, Refused] = {
    "flush_cache": Refused("nothing that was cached with other weights is ever a hit again", (True,)),
    "manifest": Refused("name the folder with model_path"),
}

WIRE_IGNORED: Mapping[str, str] = {
    **CONTROL_IGNORED,
    "flush_cache": "whether what other weights computed may be a hit; here it never is",
    "disable_draft_model": "for a second model that guesses; there is none here",
    "rank_offset": "a place in a group of torch's; a trainer's transfer server gives to whoever asks",
    "world_size": "a place in a group of torch's; a trainer's transfer server gives to whoever asks",
}
"""The same for the bodies of weights that come over a wire."""

WIRE_REFUSED: Mapping[str, Refused] = {"manifest": Refused("say names, dtypes and shapes")}


_CHAT = "a chat's; here it asks for nothing"

CHAT_IGNORED: Mapping[str, str] = {
    "parallel_tool_calls": _CHAT,
    "separate_reasoning": _CHAT,
    "include_reasoning": _CHAT,
}
"""The same for what is no chat."""

CHAT_REFUSED: Mapping[str, Refused] = {
    "tools": Refused("send messages to /v1/chat/completions", ([],)),
    "tool_choice": Refused("send messages to /v1/chat/completions", ("none", "auto")),
}


ONLY_GENERATE: Mapping[str, Refused] = {
    "image_data": Refused("send image_url as a part of a chat's message, or image_data to /generate", ([], "")),
    "return_routed_experts": Refused("send token ids to /generate", (False,)),
    "routed_experts_start_len": Refused("send token ids to /generate", (0,)),
}
"""And for what is not ``/generate``."""


def markdown() -> str:
    """All lists as tables for the documentation, names that share a reason in one row."""
    return "\n\n".join(
        (
            tables(IGNORED, REFUSED),
            "And of C and G:",
            tables(CHAT_IGNORED, CHAT_REFUSED),
            "And of C, H and `/tokenize`:",
            tables({}, ONLY_GENERATE),
            "And of the bodies of control (`/update_weights_from_disk`, `/abort_request`, ...):",
            tables(CONTROL_IGNORED, CONTROL_REFUSED),
            "And of the bodies of weights that come over a wire (`/update_weights_from_tensor`, ...):",
            tables(WIRE_IGNORED, WIRE_REFUSED),
        )
    )


def tables(taken: Mapping[str, str], others: Mapping[str, Refused]) -> str:
    """What is taken and changes nothing, and what is refused."""
    refused: dict[str, list[str]] = {}
    for name, field in others.items():
        nothing = f" (but {', '.join(map(_code, field.nothing))})" if field.nothing else ""
        refused.setdefault(field.instead, []).append(f"`{name}`{nothing}")
    ignored: dict[str, list[str]] = {}
    for name, reason in taken.items():
        ignored.setdefault(reason, []).append(f"`{name}`")
    both = (("taken, and changes nothing", "because it is", ignored), ("refused", "instead", refused))
    return "\n\n".join(_table(*each) for each in both if each[-1])


def _table(names: str, reason: str, rows: Mapping[str, list[str]]) -> str:
    lines = [f"| {names} | {reason} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {', '.join(each)} | {why} |" for why, each in rows.items())])


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


_LABEL = "a label for the operator's records"
_ROUTING = "where OpenAI keeps or computes a request; there is one place here"

IGNORED: Mapping[str, str] = {
    "user": _LABEL,
    "metadata": _LABEL,
    "safety_identifier": _LABEL,
    "custom_labels": _LABEL,
    "session_id": _LABEL,
    "conversation_id": _LABEL,
    "store": "whether OpenAI stores the answer; nothing is stored here",
    "service_tier": _ROUTING,
    "prompt_cache_key": _ROUTING + ": the cache finds every prefix without it",
    "prompt_cache_retention": _ROUTING + ": see /cache/pin",
    "prediction": "a guess that makes OpenAI's answers faster, and no different",
    "stream_reasoning": "whether reasoning waits for its end; it is streamed as it comes",
    "stream_interval": "how many tokens share an event; each may come in its own",
    "guided_decoding_backend": "which library follows a grammar",
    "routing_key": "for a router in front of the server",
    "log_metrics": "what SGLang writes to its own log",
    "no_logs": "what SGLang writes to its own log",
    "background": "how SGLang's frontend waits",
    "return_bytes": "the type of SGLang's own images",
}
"""Fields that clients send in good faith and that change nothing, with the reason."""

_TEXT_ONLY = "this server takes text and images"
_TOOLS = "use tools and tool_choice, which took their place"
_DISAGGREGATED = "nodes for prefill and decode meet by bootstrap_room alone"
_ONE_RANK = "there is one replica here"
_VOCABULARY = "use logit_bias, or a grammar"

REFUSED: Mapping[str, Refused] = {
    "use_beam_search": Refused("ask for n answers", (False,)),
    "length_penalty": Refused("it belongs to beam search", (1,)),
    "early_stopping": Refused("it belongs to beam search", (False,)),
    "suffix": Refused("this server continues a prompt and inserts nothing", ("",)),
    "functions": Refused(_TOOLS, ([],)),
    "function_call": Refused(_TOOLS, ("none", "auto")),
    "web_search_options": Refused("nothing is looked up here"),
    "modalities": Refused(_TEXT_ONLY, (["text"], [])),
    "audio": Refused(_TEXT_ONLY),
    "audio_data": Refused(_TEXT_ONLY, ([], "")),
    "video_data": Refused(_TEXT_ONLY, ([], "")),
    "images_config": Refused(_TEXT_ONLY, ({},)),
    "media_io_kwargs": Refused(_TEXT_ONLY, ({},)),
    "mm_processor_kwargs": Refused(_TEXT_ONLY, ({},)),
    "max_dynamic_patch": Refused(_TEXT_ONLY),
    "min_dynamic_patch": Refused(_TEXT_ONLY),
    "use_audio_in_video": Refused(_TEXT_ONLY, (False,)),
    "input_embeds": Refused("send text or token ids", ([],)),
    "prompt_embeds": Refused("send text or token ids", ([],)),
    "return_hidden_states": Refused("only tokens and their logprobs come back", (False,)),
    "return_entropy": Refused("only tokens and their logprobs come back", (False,)),
    "routed_experts_prompt_start": Refused("use routed_experts_start_len of /generate", (0,)),
    "return_meta_info": Refused("usage and sglext are there; the rest is in /generate's meta_info", (False,)),
    "return_prompt_text": Refused("see /tokenize with messages", (False,)),
    "return_tokens_as_token_ids": Refused("use return_token_ids", (False,)),
    "logprob_token_ids": Refused("ask for top_logprobs", ([],)),
    "token_ids_logprob": Refused("ask for top_logprobs_num", ([],)),
    "allowed_token_ids": Refused(_VOCABULARY),
    "bad_words": Refused(_VOCABULARY, ([],)),
    "custom_logit_processor": Refused(_VOCABULARY, ("",)),
    "custom_params": Refused("they are for a custom_logit_processor", ({},)),
    "vllm_xargs": Refused("they are for extensions", ({},)),
    "stop_regex": Refused("use stop, or the regex that the whole answer must match", ([], "")),
    "guided_whitespace_pattern": Refused("JSON comes without white space between its parts"),
    "repetition_detection": Refused("use repetition_penalty"),
    "watermarking": Refused("answers carry no mark", (False,)),
    "thinking_token_budget": Refused("reasoning counts as the answer does: use max_tokens", (-1,)),
    "verbosity": Refused("say it in a message", ("medium",)),
    "reasoning": Refused("send reasoning_effort, which the chat template reads", ({},)),
    "truncate_prompt_tokens": Refused("cut the prompt before you send it"),
    "truncation_side": Refused("cut the prompt before you send it"),
    "documents": Refused("put them into a message", ([],)),
    "chat_template": Refused("the model's own is used: a template is a program"),
    "chat_template_content_format": Refused("content is given to the template as text", ("auto", "string")),
    "task": Refused("put it into a message"),
    "lora_path": Refused("there are no adapters", ("", [])),
    "lora_id": Refused("there are no adapters", ("", [])),
    "session_params": Refused("every prefix is found in the cache without sessions", ({},)),
    "ngram_corpus_id": Refused("what is guessed comes from what was asked and answered before", ("", [])),
    "kv_transfer_params": Refused(_DISAGGREGATED, ({},)),
    "ec_transfer_params": Refused(_DISAGGREGATED, ({},)),
    "disagg_prefill_dp_rank": Refused(_DISAGGREGATED),
    "routed_dp_rank": Refused(_ONE_RANK, (0,)),
    "data_parallel_rank": Refused(_ONE_RANK, (0,)),
}
"""Fields of OpenAI, SGLang and vLLM that would change the answer, or ask for what is not here."""
