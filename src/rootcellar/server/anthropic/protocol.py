"""What Anthropic's clients send. Types are strict; what it asks of the model is checked as a chat's is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rootcellar.server.fields import Refused
from rootcellar.server.openai.protocol import FiniteNumber
from rootcellar.server.parsing import Body
from rootcellar.server.tools import MOST_TOOLS, ToolName


class CacheControl(Body):
    """Keep the prompt up to here, for so long."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None

    @property
    def seconds(self) -> float:
        """How long."""
        return 3600.0 if self.ttl == "1h" else 300.0


class TextBlock(Body):
    """Text."""

    ignored = {"citations": "where Anthropic found what the text says"}  # noqa: RUF012

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class Base64Image(Body):
    """An image in the body."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str

    @property
    def address(self) -> str:
        """As a data URL."""
        return f"data:{self.media_type};base64,{self.data}"


class RemoteImage(Body):
    """An image by address."""

    type: Literal["url"]
    url: str

    @property
    def address(self) -> str:
        """Where it is."""
        return self.url


class ImageBlock(Body):
    """An image."""

    type: Literal["image"]
    source: Annotated[Base64Image | RemoteImage, Field(discriminator="type")]
    cache_control: CacheControl | None = None

    def part(self) -> dict[str, Any]:
        """The part of a chat's message that it is."""
        return {"type": "image_url", "image_url": {"url": self.source.address}}


class ThinkingBlock(Body):
    """What the model thought."""

    ignored = {"signature": "how Anthropic knows its own thoughts again"}  # noqa: RUF012

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Body):
    """What a model of Anthropic's thought, which nobody can read: it is left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Body):
    """A call of a tool."""

    ignored = {  # noqa: RUF012
        "caller": "whether a program of Anthropic's called; here the model does",
        "toolset_name": "a name for several tools at Anthropic",
    }

    type: Literal["tool_use"]
    id: str
    name: ToolName
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Body):
    """What a call of a tool gave."""

    ignored = {"toolset_name": "a name for several tools at Anthropic"}  # noqa: RUF012

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


ContentBlock = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class AnthropicMessage(Body):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class ClientTool(Body):
    """A tool of the client's own."""

    ignored = {  # noqa: RUF012
        "eager_input_streaming": "arguments are streamed as they are made in any case",
        "defer_loading": "for Anthropic's search among tools; here the model is told of all",
        "allowed_callers": "whether a program of Anthropic's may call; here the model does",
        "input_examples": "examples that Anthropic's models are shown; the schema is what counts here",
    }

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoiceRule(Body):
    """Whether, and which, tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Body):
    """Whether the model thinks before it speaks."""

    ignored = {  # noqa: RUF012
        "budget_tokens": "thoughts count as the answer does: max_tokens bounds both",
        "display": "whether Anthropic sums thoughts up",
    }

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How much work the model puts into the answer, and its form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Body):
    """The body of ``POST /v1/messages/count_tokens``: what of a request becomes the prompt."""

    ignored = {  # noqa: RUF012
        "metadata": "a label for the operator's records",
        "service_tier": "where Anthropic computes a request; there is one place here",
        "inference_geo": "where Anthropic computes a request; there is one place here",
        "speed": "where Anthropic computes a request; there is one place here",
        "diagnostics": "for Anthropic's own explanations: see /cache/explain",
        "context_management": "what Anthropic forgets of a long conversation; here nothing is forgotten",
        "user_profile_id": "a label for the operator's records",
        "workspace_id": "a label for the operator's records",
        "betas": "which of Anthropic's trials are on",
    }
    refused = {  # noqa: RUF012
        "container": Refused("nothing is run here"),
        "mcp_servers": Refused("the client calls tools", ([],)),
        "prefill": Refused("send a last message of the assistant's"),
    }

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=4096)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ClientTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoiceRule | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountRequest):
    """The body of ``POST /v1/messages``; beyond Anthropic's own fields those that part the cache."""

    max_tokens: Annotated[int, Field(ge=0)]
    stream: bool | None = False
    temperature: FiniteNumber | None = None
    top_p: FiniteNumber | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
