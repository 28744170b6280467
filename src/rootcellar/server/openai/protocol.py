"""What OpenAI's clients send, with the fields of SGLang and vLLM; which others there are is in ``server/fields.py``.

Types are strict; values are checked where they are used, by the engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, WithJsonSchema
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from rootcellar.server.errors import invalid
from rootcellar.server.fields import CHAT_IGNORED, CHAT_REFUSED, IGNORED, ONLY_GENERATE, REFUSED, Refused
from rootcellar.server.native.protocol import BootstrapHost, BootstrapNumber, Priority
from rootcellar.server.openai.forms import Forms
from rootcellar.server.openai.parts import content_for_template
from rootcellar.server.parsing import Body, FailFast
from rootcellar.server.tools import ToolChoice, ToolList

Prompt = Annotated[
    str | list[Any],
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ],
            "description": "A text, a list of texts, token ids, or a list of lists of them.",
        }
    ),
]
FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]
# Of the likeliest tokens beside each, as at OpenAI.
MOST_LOGPROBS = 20
MOST_MESSAGES = 4096


class StreamOptions(Body):
    """Whether a stream says what it used: at its end, or with every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(Forms):
    """What the two kinds of completion have in common; beyond OpenAI's own fields, those of SGLang and vLLM."""

    ignored = IGNORED
    refused = {**REFUSED, **ONLY_GENERATE}  # noqa: RUF012

    model: str | None = None
    temperature: FiniteNumber | None = None
    top_p: FiniteNumber | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: FiniteNumber | None = None
    presence_penalty: FiniteNumber | None = None
    logit_bias: dict[str, Any] | None = None
    best_of: int | None = None

    top_k: int | None = None
    min_p: FiniteNumber | None = None
    repetition_penalty: FiniteNumber | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = False
    return_token_ids: bool | None = None
    return_cached_tokens_details: bool | None = None
    explain: bool | None = None
    cache_hints: dict[str, Any] | None = None
    rid: str | None = None
    request_id: str | None = None
    priority: Priority | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    bootstrap_host: BootstrapHost = None
    bootstrap_port: BootstrapNumber = None
    bootstrap_room: BootstrapNumber = None

    def arguments(self, max_new_tokens: int, top: int | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """What ``Engine.generate`` is asked, beyond the prompts. Raises ``ApiError`` for what is not supported.

        ``top``: how many of the likeliest tokens are shown beside each; None: no logprobs. ``defaults``: sampling
        parameters where the request does not say.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of is not supported: leave it out, or equal to n", "best_of")
        before = self.prompt_logprobs
        if before is not None and not 0 <= before <= MOST_LOGPROBS:
            raise invalid(f"prompt_logprobs must be from 0 to {MOST_LOGPROBS}", "prompt_logprobs")
        if before is not None and self.stream:
            raise invalid("prompt_logprobs come with a whole answer: leave out stream", "prompt_logprobs")
        return {
            "sampling_params": {**defaults, **self.sampling_params(max_new_tokens)},
            "return_logprob": top is not None or before is not None,
            "top_logprobs_num": max(top or 0, before or 0),
            "logprob_start_len": -1 if before is None else 0,
            "priority": self.priority or 0,
            "extra_key": self.extra_key or "",
            "cache_salt": self.cache_salt or "",
            "bootstrap_host": self.bootstrap_host,
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": self.bootstrap_room,
        }

    def sampling_params(self, max_new_tokens: int) -> dict[str, Any]:
        """The engine's sampling parameters, as far as they were given."""
        keep = self.include_stop_str_in_output
        if None not in (keep, self.no_stop_trim) and keep != self.no_stop_trim:
            name = "include_stop_str_in_output"
            raise invalid(f"{name} and no_stop_trim are two names of one thing: give one of them", name)
        given = {
            **{name: getattr(self, name) for name in _SAME_NAME},
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": self.min_tokens,
            "no_stop_trim": self.no_stop_trim if keep is None else keep,
            **self.grammar(),
        }
        return {name: value for name, value in given.items() if value is not None}

    def name(self, prefix: str) -> str:
        """The request's id."""
        return self.rid or self.request_id or f"{prefix}-{uuid.uuid4().hex}"


_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_token_ids",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


class CompletionRequest(Sampling):
    """The body of ``POST /v1/completions``."""

    ignored = {**IGNORED, **CHAT_IGNORED}  # noqa: RUF012
    refused = {**REFUSED, **CHAT_REFUSED, **ONLY_GENERATE}  # noqa: RUF012

    prompt: Prompt
    max_tokens: int | None = 16
    logprobs: int | None = None
    add_special_tokens: bool = True

    def limit(self) -> int:
        """Most tokens of an answer."""
        return 16 if self.max_tokens is None else self.max_tokens


class ChatMessage(TypedDict):
    """One message of a conversation; what a model's template knows beyond these fields is passed on.

    A dict and no object: there may be thousands, and the event loop waits for the last.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: NotRequired[str | Annotated[list[dict[str, Any]], FailFast()] | None]


def message_for_template(message: ChatMessage) -> dict[str, Any]:
    """The message with its content as templates take it; see ``parts.content_for_template``."""
    return {**message, "content": content_for_template(message)}


# Each of them costs the event loop a few microseconds to check, and a template more.
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


class Rendering(Body):
    """How the model's template makes a text of messages, and of the tools that are offered with them."""

    tools: ToolList | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | float | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(Sampling, Rendering):
    """The body of ``POST /v1/chat/completions``."""

    refused = {**REFUSED, **ONLY_GENERATE, "add_special_tokens": Refused("the chat template writes its own", (False,))}  # noqa: RUF012

    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_prompt_token_ids: bool | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    include_reasoning: bool | None = None

    def limit(self) -> int | None:
        """Most tokens of the answer, by its newer name or its older one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def chat_request(given: Mapping[str, Any], name: str) -> ChatRequest:
    """The chat that a request in another form is. ``ApiError``: what its client calls ``name`` is too many messages."""
    if len(given["messages"]) > MOST_MESSAGES:
        raise invalid(
            f"{name} are {len(given['messages'])} messages of a chat: at most {MOST_MESSAGES} are taken", name
        )
    return ChatRequest.model_validate(given)
