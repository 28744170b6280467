"""The parts of a message: text, and images, of which a chat template is told only where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rootcellar.server.errors import invalid
from rootcellar.server.images import ImageSource, image_source

# Whose messages may have images.
_SEEING = ("user",)


def content_for_template(message: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """A message's content as one text; where it has images as parts, ``{"type": "image"}`` for each of them.

    None stays where tools are called: templates ask for it. ``ApiError``: a part of another type.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return None
    parts = content or []
    if not any(part.get("type") == "image_url" for part in parts):
        return "".join(_text(part) for part in parts)
    if message.get("role") not in _SEEING:
        raise invalid(f"messages: the {message.get('role')} shows no images: send them as the user's", "messages")
    return [
        {"type": "image"} if part.get("type") == "image_url" else {"type": "text", "text": _text(part)}
        for part in parts
    ]


def images_of(messages: Iterable[Mapping[str, Any]]) -> list[ImageSource]:
    """All images of a conversation, in their order."""
    return [
        image_source(part.get("image_url"), "messages")
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part.get("type") == "image_url"
    ]


def joined(parts: Sequence[str | dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a message of texts and images: texts next to each other are one, each a line or more of it."""
    if all(isinstance(part, str) for part in parts):
        return "\n".join(map(str, parts))
    found: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, str):
            found.append(part)
        elif found and found[-1]["type"] == "text":
            found[-1]["text"] += "\n" + part
        else:
            found.append({"type": "text", "text": part})
    return found


def _text(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise invalid(
            f"messages: a part of type {str(part.get('type'))[:80]!r} is not supported: send text or image_url",
            "messages",
        )
    return text
