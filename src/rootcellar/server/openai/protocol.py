"""What OpenAI's clients send. Types are strict; values are checked where they are used, by the engine.

Fields that this server does not know are ignored, as the other engines do: clients send more than they need. Known
fields that would change the answer and are not supported are refused.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import orjson
from pydantic import ConfigDict, Field, WithJsonSchema

from rootcellar.grammars.schemas import closed
from rootcellar.server.errors import invalid
from rootcellar.server.native.protocol import Priority, namespace
from rootcellar.server.parsing import Body

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
Number = Annotated[float, Field(allow_inf_nan=False)]


# A schema is closed on the event loop, which must not stand still.
_LONGEST_STRICT = 2**17


class StreamOptions(Body):
    """Whether a stream says what it used: at its end, or with every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(Body):
    """A named JSON schema."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Sampling(Body):
    """What the two kinds of completion have in common; beyond OpenAI's own fields, those of SGLang and vLLM."""

    model: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | dict[str, Any] | None = None
    rid: str | None = None
    priority: Priority | None = None
    cache_salt: str | None = None
    extra_key: str | None = None

    def arguments(self, max_new_tokens: int, top: int | None) -> dict[str, Any]:
        """What ``Engine.generate`` is asked, beyond the prompts. Raises ``ApiError`` for what is not supported.

        ``top``: how many of the likeliest tokens are shown beside each; None: no logprobs.
        """
        return {
            "sampling_params": self._sampling_params(max_new_tokens),
            "return_logprob": top is not None,
            "top_logprobs_num": top or 0,
            "priority": self.priority or 0,
            "extra_key": namespace(self.cache_salt, self.extra_key),
        }

    def _sampling_params(self, max_new_tokens: int) -> dict[str, Any]:
        given = {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": self.min_tokens,
            **{name: getattr(self, name) for name in _SAME_NAME},
            **self._grammar(),
        }
        return {name: value for name, value in given.items() if value is not None}

    def _grammar(self) -> dict[str, str]:
        form = self.response_format
        if form is None or form.type == "text":
            return {}
        if form.type == "json_object":
            return {"json_schema": '{"type": "object"}'}
        schema = None if form.json_schema is None else form.json_schema.schema_
        if schema is None:
            raise invalid(
                'response_format of type json_schema needs {"json_schema": {"name": ..., "schema": {...}}}',
                "response_format",
            )
        text = orjson.dumps(schema).decode()
        if form.json_schema is None or not form.json_schema.strict:
            return {"json_schema": text}
        if len(text) > _LONGEST_STRICT:
            raise invalid(f"response_format: a strict schema may have {_LONGEST_STRICT} characters", "response_format")
        return {"json_schema": orjson.dumps(closed(schema)).decode()}

    def name(self, prefix: str) -> str:
        """The request's id."""
        return self.rid or f"{prefix}-{uuid.uuid4().hex}"


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
    "no_stop_trim",
    "regex",
    "ebnf",
    "json_schema",
)


class CompletionRequest(Sampling):
    """The body of ``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: int | None = 16
    echo: bool | None = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class ChatMessage(Body):
    """One message of a conversation; what a model's template knows beyond these fields is passed on."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message with its content as one text."""
        text = self.content if isinstance(self.content, str) else "".join(_text(part) for part in self.content or [])
        return {**(self.model_extra or {}), "role": self.role, "content": text}


def _text(part: dict[str, Any]) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise invalid(f"messages: a part of type {part.get('type')!r} is not supported: send text", "messages")
    return text


# Each of them costs the event loop a few microseconds to check, and a template more.
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]


class ChatRequest(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def limit(self) -> int | None:
        """Most tokens of the answer, by its newer name or its older one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
