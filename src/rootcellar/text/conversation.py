"""Messages made ready for a chat template, and the template's text made ready to be continued."""

from __future__ import annotations

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
