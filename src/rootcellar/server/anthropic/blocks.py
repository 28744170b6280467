"""Anthropic's messages as the chat that they are: blocks become messages that chat templates know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rootcellar.server.anthropic.protocol import (
    AnthropicMessage,
    CacheControl,
    CountRequest,
    ImageBlock,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from rootcellar.server.errors import invalid
from rootcellar.server.openai.parts import joined
from rootcellar.server.openai.protocol import ChatRequest, chat_request

# A text that Claude Code puts before its system prompt, another in each request: nothing would be found in the cache.
_CHANGING = "x-anthropic-billing-header:"
_EFFORTS = {"xhigh": "high", "max": "high"}


@dataclass(frozen=True)
class Mark:
    """The prompt up to the end of so many ``messages`` of the chat is to be kept for so many ``seconds``."""

    messages: int
    seconds: float


def chat_of(body: CountRequest) -> tuple[ChatRequest, list[Mark]]:
    """The chat that ``body`` is, and what of it is to be kept."""
    messages: list[dict[str, Any]] = []
    marks: list[Mark] = []

    def mark(control: CacheControl | None) -> None:
        if control is not None:
            marks.append(Mark(len(messages), control.seconds))

    for tool in body.tools or ():
        mark(tool.cache_control)
    system = [TextBlock(type="text", text=body.system)] if isinstance(body.system, str) else body.system or []
    shown = [block.text for block in system if not block.text.startswith(_CHANGING)]
    if shown:
        messages.append({"role": "system", "content": "\n".join(shown)})
    for block in system:
        mark(block.cache_control)
    names: dict[str, str] = {}
    later: dict[int, list[str]] = {}
    for message in body.messages:
        for turn in _turn(message, names):
            _add(messages, turn, later)
        for each in message.content if isinstance(message.content, list) else ():
            if isinstance(each, TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock):
                mark(each.cache_control)
    mark(body.cache_control)
    for i, said in later.items():
        content = messages[i]["content"]
        if isinstance(content, list):
            messages[i]["content"] = [*content, {"type": "text", "text": "\n".join(said)}]
        else:
            messages[i]["content"] = "\n".join(filter(None, [content, *said]))  # a call's turn has none
    if not messages:
        raise invalid("messages say nothing that this model can read", "messages")
    return chat_request({**_settings(body, messages[-1]), "messages": messages}, "messages"), marks


def _add(messages: list[dict[str, Any]], turn: dict[str, Any], later: dict[int, list[str]]) -> None:
    """Add a turn. Few templates know a system that speaks later: then it is told in the user's turn, and marked so.

    ``later``: what is told at the end of which message; put there once, however much it is.
    """
    if turn["role"] != "user" and isinstance(turn["content"], list):
        raise invalid(f"messages: the {turn['role']} shows no images: send them as the user's", "messages")
    if turn["role"] == "system" and messages and messages[-1]["role"] != "system":
        said = f"<system-reminder>\n{turn['content']}\n</system-reminder>"
        if messages[-1]["role"] == "user":
            later.setdefault(len(messages) - 1, []).append(said)
            return
        turn = {"role": "user", "content": said}
    messages.append(turn)


def _turn(message: AnthropicMessage, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One turn as the messages that it is: results of tools are messages of their own. ``names``: of calls by id."""
    blocks = message.content
    if isinstance(blocks, str):
        yield {"role": message.role, "content": blocks}
        return
    texts: list[str | dict[str, Any]] = []
    shown: list[str | dict[str, Any]] = []  # by tools: few templates know a tool that shows images, so the user does
    thoughts, calls = [], []
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ImageBlock():
                texts.append(block.part())
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                names[block.id] = block.name
                given = json.dumps(block.input, ensure_ascii=False)
                function = {"name": block.name, "arguments": given}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                if texts:
                    yield {"role": message.role, "content": joined(texts)}
                    texts = []
                yield _result(block, names)
                if isinstance(block.content, list):
                    shown += [part.part() for part in block.content if isinstance(part, ImageBlock)]
    texts = [*shown, *texts]
    if not (texts or thoughts or calls) and blocks:
        return
    turn: dict[str, Any] = {"role": message.role, "content": joined(texts)}
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn |= {"tool_calls": calls, "content": turn["content"] or None}
    yield turn


def _result(block: ToolResultBlock, names: dict[str, str]) -> dict[str, Any]:
    content = block.content or ""
    text = (
        content if isinstance(content, str) else "\n".join(part.text for part in content if isinstance(part, TextBlock))
    )
    found = {"role": "tool", "tool_call_id": block.tool_use_id, "content": f"Error: {text}" if block.is_error else text}
    return {**found, "name": names[block.tool_use_id]} if block.tool_use_id in names else found


def _settings(body: CountRequest, last: dict[str, Any]) -> dict[str, Any]:
    """All but the messages, by a chat's names."""
    given: dict[str, Any] = {"model": body.model}
    if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
        given["continue_final_message"] = True
    if body.tools:
        given["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in body.tools
        ]
    rule = body.tool_choice
    if rule is not None:
        named = {"type": "function", "function": {"name": rule.name}} if rule.name is not None else "required"
        given["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[rule.type]
        given["parallel_tool_calls"] = not rule.disable_parallel_tool_use
    if body.thinking is not None:
        thinks = body.thinking.type != "disabled"
        given["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
        given["include_reasoning"] = thinks
    config = body.output_config
    if config is not None and config.effort is not None:
        given["reasoning_effort"] = _EFFORTS.get(config.effort, config.effort)
    if config is not None and config.format is not None:
        form = {"name": "answer", "schema": config.format.schema_, "strict": True}
        given["response_format"] = {"type": "json_schema", "json_schema": form}
    if isinstance(body, MessagesRequest):
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k", "cache_salt", "extra_key")
        given |= {name: getattr(body, name) for name in same}
        given["stop"] = body.stop_sequences
    return given
