"""Items of a response as the chat that they are, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rootcellar.server.errors import invalid
from rootcellar.server.openai.parts import joined
from rootcellar.server.openai.protocol import ChatRequest, chat_request
from rootcellar.server.openai.speaker import Speaker
from rootcellar.server.responses.protocol import (
    CallItem,
    FunctionTool,
    MessageItem,
    NamedFunction,
    NamespaceTool,
    ResponseItem,
    ResponsesRequest,
    ResultItem,
    ShownImage,
    TextPart,
    ThoughtItem,
)
from rootcellar.server.tools import MOST_TOOLS

Turn = dict[str, Any]


def turns_of(given: str | Sequence[ResponseItem], before: Sequence[Turn] = ()) -> list[Turn]:
    """The messages of a chat: what the assistant thinks, says and calls in a row is one of them.

    ``before``: those that it goes on from, whose calls may have their results here.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    turns: list[Turn] = []
    names = {call["id"]: call["function"]["name"] for turn in before for call in turn.get("tool_calls", ())}
    for item in given:
        match item:
            case MessageItem(role="assistant"):
                turn = _speaking(turns, "content")
                turn["content"] = _content(item.content)
            case MessageItem():
                turns.append({"role": item.role, "content": _content(item.content)})
            case ThoughtItem():
                parts = item.content or item.summary or []
                if parts:
                    _speaking(turns, "reasoning_content")["reasoning_content"] = "\n".join(part.text for part in parts)
            case CallItem():
                name = item.name if item.namespace is None else f"{item.namespace}.{item.name}"
                function = {"name": name, "arguments": item.arguments}
                names[item.call_id] = name
                call = {"id": item.call_id, "type": "function", "function": function}
                turn = _speaking(turns)
                turn.setdefault("tool_calls", []).append(call)
            case ResultItem():
                result = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
                turns.append({**result, "name": names[item.call_id]} if item.call_id in names else result)
    return turns


def turn_of(speaker: Speaker) -> Turn:
    """What an answer was, as a turn of the next chat."""
    turn = speaker.message()
    return {**turn, "content": turn["content"] or None} if speaker.calls else turn


def _speaking(turns: list[Turn], new: str = "") -> Turn:
    """The turn in which the assistant is speaking, or a new one: also where that has said ``new`` already."""
    last = turns[-1] if turns else {}
    if last.get("role") != "assistant" or last.get(new) or (new and last.get("tool_calls")):
        turns.append({"role": "assistant", "content": None})
    return turns[-1]


def _content(content: str | Sequence[TextPart | ShownImage]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return joined([part.text if isinstance(part, TextPart) else part.part() for part in content])


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def functions_of(body: ResponsesRequest) -> dict[str, tuple[str | None, FunctionTool]]:
    """What is offered, by the name that the model is told: each with its namespace. ``ApiError``: many, or alike."""
    found: dict[str, tuple[str | None, FunctionTool]] = {}
    for tool in body.tools or ():
        space = tool.name if isinstance(tool, NamespaceTool) else None
        for i, each in enumerate(tool.tools if isinstance(tool, NamespaceTool) else [tool]):
            name = each.name if space is None else f"{space}.{each.name}"
            if name in found or len(name) > 128:
                raise invalid(f"two tools are called {name[:128]!r}, or that is too long a name", "tools")
            told = [tool.description, each.description] if space is not None and not i else [each.description]
            shown = "\n\n".join(text for text in told if text) or None
            found[name] = space, each.model_copy(update={"description": shown})
    if len(found) > MOST_TOOLS:
        raise invalid(f"tools are {len(found)} functions: at most {MOST_TOOLS} are taken", "tools")
    return found


def chat_of(body: ResponsesRequest, before: Sequence[Turn]) -> tuple[ChatRequest, list[Turn]]:
    """The chat that ``body`` is, behind the turns ``before`` it; and its turns without instructions."""
    turns = [*before, *turns_of(body.input, before)]
    if not turns:
        raise invalid("input is empty: give a text or an item", "input")
    spoken = [{**turn, "content": turn["content"] or ""} if not turn.get("tool_calls") else turn for turn in turns]
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    given: dict[str, Any] = {
        "model": body.model,
        "messages": [*system, *spoken],
        "max_completion_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
    }
    given |= {name: getattr(body, name) for name in ("temperature", "top_p", "cache_salt", "extra_key", "request_id")}
    if body.tools:
        shown = ("description", "parameters", "strict")
        given["tools"] = [
            {"type": "function", "function": {"name": name, **{each: getattr(tool, each) for each in shown}}}
            for name, (_, tool) in functions_of(body).items()
        ]
    choice = body.tool_choice
    named = isinstance(choice, NamedFunction)
    given["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if named else choice  # type: ignore[union-attr]
    form = None if body.text is None else body.text.format
    if form is not None and form.type != "text":
        schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
        given["response_format"] = {"type": form.type} | ({"json_schema": schema} if form.type == "json_schema" else {})
    return chat_request(given, "input"), turns
