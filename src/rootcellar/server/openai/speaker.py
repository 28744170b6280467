"""What one answer to a chat has said so far, in OpenAI's words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rootcellar.server.tools import Listening
from rootcellar.text.speech import Called, Parser, Passed, Said, Thought, Utterance


@dataclass
class ToolCall:
    """One call of a tool: its id, the tool's name, the JSON text of its arguments."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Speaker:
    """Hears the text of one answer, and tells what is new of it and what there is.

    ``text`` and ``thought`` are what was said and thought; ``id_prefix`` is what the ids of calls begin with.
    """

    reading: Listening
    id_prefix: str = "call_"
    text: str = ""
    thought: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    _parser: Parser | None = field(init=False)

    def __post_init__(self) -> None:
        self._parser = None if self.reading.plain else self.reading.parser()

    def events(self, text: str, *, ended: bool) -> list[Utterance]:
        """What ``text``, which is new, says; ``ended``: it is the last."""
        if self._parser is None:
            found: list[Utterance] = [Said(text)] if text else []
        else:
            found = self._parser.add(text) + (self._parser.end() if ended else [])
        if not self.reading.show_thoughts:
            found = [event for event in found if not isinstance(event, Thought)]
        for event in found:
            match event:
                case Said():
                    self.text += event.text
                case Thought():
                    self.thought += event.text
                case Called():
                    self.calls.append(ToolCall(self.reading.call_id(self.id_prefix), event.name))
                case Passed():
                    self.calls[-1].arguments += event.text
        return found

    def hear(self, text: str, *, ended: bool) -> dict[str, Any]:
        """The fields of a delta for ``text``."""
        before = len(self.calls)
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        at = before - 1
        for event in self.events(text, ended=ended):
            match event:
                case Said():
                    delta["content"] = delta.get("content", "") + event.text
                case Thought():
                    delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
                case Called():
                    at += 1
                    head = {"index": at, "id": self.calls[at].id, "type": "function"}
                    calls[at] = {**head, "function": {"name": event.name, "arguments": ""}}
                case Passed():
                    function = calls.setdefault(at, {"index": at, "function": {"arguments": ""}})["function"]
                    function["arguments"] += event.text
        return {**delta, "tool_calls": list(calls.values())} if calls else delta

    def message(self, echo: str = "") -> dict[str, Any]:
        """The whole message, behind ``echo``."""
        text = echo + self.text
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not self.calls else None}
        if self.thought:
            message["reasoning_content"] = self.thought
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message
