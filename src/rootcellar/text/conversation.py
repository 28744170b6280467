"""Messages made ready for a chat template, and the template's text made ready to be continued."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rootcellar.errors import RequestError

# What marks the end of a message that is to be continued. A template that trims its messages takes the last space away:
# then the message's own trailing space would not have come through either. (The method is that of transformers.)
_MARK = "<rootcellar continues here> "


def known_roles(messages: Sequence[Mapping[str, Any]], templates: Iterable[str]) -> Sequence[Mapping[str, Any]]:
    """``messages`` in which developers speak as the system, unless a template (their sources) knows developers.

    That is what they are at OpenAI: the system, as later models call it.
    """
    if any("developer" in source for source in templates):
        return messages
    return [{**each, "role": "system"} if each.get("role") == "developer" else each for each in messages]


# How Hermes' and Qwen's templates tell of tools, for models whose own template knows none.
_TELLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Mapping[str, Any]]:
    """``messages`` for a template that knows no tools: they, calls of them and their results are told as text."""
    told: list[Mapping[str, Any]] = []
    described = _TELLS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    first = messages[0] if messages else {}
    if first.get("role") == "system" and isinstance(first.get("content"), str):
        told.append({**first, "content": f"{first['content']}\n\n{described}"})
        messages = messages[1:]
    else:
        told.append({"role": "system", "content": described})
    for message in messages:
        content = message.get("content") or ""
        if message.get("role") == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if told[-1].get("role") == "user" and str(told[-1]["content"]).startswith("<tool_response>"):
                told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n{content}"}
            else:
                told.append({"role": "user", "content": content})
        elif isinstance(calls := message.get("tool_calls"), list):
            parts = [content] * bool(content) + [_call(call) for call in calls]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            told.append({**rest, "content": "\n".join(parts)})
        else:
            told.append(message)
    return told


def _call(call: Any) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments")
    # As the model wrote it: the same tokens again.
    written = json.dumps(arguments, ensure_ascii=False) if type(arguments) is dict else str(arguments)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {written}}}\n</tool_call>'


def marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``messages`` whose last one, which must be a text, ends with a mark; ``RequestError`` when it is none."""
    last = messages[-1] if messages else {}
    if not isinstance(last.get("content"), str) or last.get("tool_calls"):
        raise RequestError(
            "continue_final_message=True needs a last message whose content is a text, without tool calls"
        )
    return [*messages[:-1], {**last, "content": last["content"] + _MARK}]


def up_to_mark(text: str) -> str:
    """The template's text up to the mark; ``RequestError`` when the template left the message out."""
    at = text.rfind(_MARK)
    if at >= 0:
        return text[:at]
    at = text.rfind(_MARK.rstrip())
    if at < 0:
        raise RequestError("continue_final_message=True: the model's chat template leaves the last message out")
    return text[:at].rstrip()
