"""What clients of OpenAI's responses send. Types are strict; what it asks of the model is checked as a chat's is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from rootcellar.server.fields import Refused
from rootcellar.server.openai.protocol import FiniteNumber
from rootcellar.server.parsing import Body
from rootcellar.server.tools import MOST_TOOLS, ToolName

_STATE = {"status": "how far OpenAI was", "id": "a name for the item", "phase": "whether more was to come"}
_NAMES = {"name": "the call says it", "namespace": "a name for several tools", "caller": "who called at OpenAI"}


class TextPart(Body):
    """Text of a message."""

    ignored = {  # noqa: RUF012
        "annotations": "where OpenAI found what the text says",
        "logprobs": "how likely it was",
    }

    type: Literal["input_text", "output_text", "text"]
    text: str


class ShownImage(Body):
    """An image of a message."""

    refused = {"file_id": Refused("send it as a data URL")}  # noqa: RUF012

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None

    def part(self) -> dict[str, Any]:
        """The part of a chat's message that it is."""
        return {"type": "image_url", "image_url": {"url": self.image_url, "detail": self.detail or "auto"}}


class MessageItem(Body):
    """A message of a conversation."""

    ignored = _STATE

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[TextPart | ShownImage, Discriminator("type")]]


class CallItem(Body):
    """A call of a function."""

    ignored = {**_STATE, "caller": _NAMES["caller"]}  # noqa: RUF012

    type: Literal["function_call"]
    call_id: str
    name: ToolName
    namespace: ToolName | None = None
    arguments: str


class ResultItem(Body):
    """What a call of a function gave."""

    ignored = {**_STATE, **_NAMES}  # noqa: RUF012

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]


class ThoughtPart(Body):
    """Text of thoughts."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ThoughtItem(Body):
    """What the model thought."""

    ignored = {**_STATE, "encrypted_content": "what only OpenAI can read"}  # noqa: RUF012

    type: Literal["reasoning"]
    summary: list[ThoughtPart] | None = None
    content: list[ThoughtPart] | None = None


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return kind if isinstance(kind, str) else "message"


ResponseItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Body):
    """A function that the client has."""

    ignored = {  # noqa: RUF012
        "output_schema": "what it gives: the model sees that in the result",
        "defer_loading": "for OpenAI's search among tools; here the model is told of all",
        "allowed_callers": "whether a program of OpenAI's may call; here the model does",
    }

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamespaceTool(Body):
    """Functions of one name in front: each is offered as ``namespace.function``."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)]


ResponseTool = Annotated[FunctionTool | NamespaceTool, Field(discriminator="type")]


class NamedFunction(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: ToolName


class TextForm(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """What the text is to be."""

    refused = {"verbosity": Refused("say it in a message", ("medium",))}  # noqa: RUF012

    format: TextForm | None = None


class Effort(Body):
    """How much the model thinks."""

    ignored = {  # noqa: RUF012
        "summary": "whether OpenAI sums thoughts up; here they are given as they are",
        "generate_summary": "whether OpenAI sums thoughts up; here they are given as they are",
        "context": "which thoughts OpenAI keeps; here the chat template decides",
        "mode": "how OpenAI computes",
    }

    effort: str | None = None


class ResponsesRequest(Body):
    """The body of ``POST /v1/responses``; beyond OpenAI's own fields those that part the cache, and a name."""

    ignored = {  # noqa: RUF012
        "user": "a label for the operator's records",
        "safety_identifier": "a label for the operator's records",
        "client_metadata": "a label for the operator's records",
        "service_tier": "where OpenAI computes a request; there is one place here",
        "prompt_cache_key": "where OpenAI computes a request: the cache finds every prefix without it",
        "prompt_cache_retention": "how long OpenAI keeps a prefix: see response_pin",
        "prompt_cache_options": "how long OpenAI keeps a prefix: see response_pin",
        "include": "what else OpenAI tells: thoughts are told as they are",
        "stream_options": "whether OpenAI pads events",
        "context_management": "what OpenAI forgets of a long conversation; here nothing is forgotten",
    }
    refused = {  # noqa: RUF012
        "background": Refused("wait for the answer, or stream it", (False,)),
        "conversation": Refused("use previous_response_id"),
        "prompt": Refused("send its text"),
        "max_tool_calls": Refused("no tool is run here: the client calls them"),
        "top_logprobs": Refused("ask /v1/chat/completions for logprobs", (0,)),
        "truncation": Refused("shorten the conversation before you send it", ("disabled",)),
        "moderation": Refused("nothing is judged here"),
        "image": Refused("send input_image as a part of a message"),
    }

    model: str | None = None
    input: str | Annotated[list[ResponseItem], Field(max_length=4096)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    stream: bool | None = False
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: FiniteNumber | None = None
    top_p: FiniteNumber | None = None
    text: TextConfig | None = None
    reasoning: Effort | None = None
    metadata: dict[str, Any] | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
