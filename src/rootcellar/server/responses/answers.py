"""Answers in the form of OpenAI's responses, whole and as the events of a stream."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rootcellar.server.answer import named_event
from rootcellar.server.openai.speaker import Speaker
from rootcellar.text.speech import Called, Passed, Said, Thought, Utterance

Output = dict[str, Any]


@dataclass
class ItemWriter:
    """The items of one answer as it is made, and the events that tell of them.

    ``spaces`` are the namespaces of functions by the names that the model is told. ``items`` are those that there are;
    each event has the next ``number``.
    """

    speaker: Speaker
    spaces: Mapping[str, str] = field(default_factory=dict)
    items: list[Output] = field(default_factory=list)
    number: int = 0
    _open: type[Utterance] | None = None
    _called: int = 0

    def event(self, kind: str, **content: Any) -> bytes:
        """One event."""
        made = named_event({"type": kind, "sequence_number": self.number, **content})
        self.number += 1
        return made

    def write(self, events: list[Utterance]) -> Iterator[bytes]:
        """What is new."""
        for event in events:
            match event:
                case Said():
                    if self._open is not Said:
                        if not event.text.strip():
                            continue
                        message = {"type": "message", "id": _id("msg"), "role": "assistant", "content": []}
                        yield from self._begin(Said, message, _said(""))
                    self.items[-1]["content"][0]["text"] += event.text
                    yield self._delta("output_text", delta=event.text, logprobs=[])
                case Thought():
                    if self._open is not Thought:
                        thoughts = {"type": "reasoning", "id": _id("rs"), "summary": [], "content": []}
                        yield from self._begin(Thought, thoughts, {"type": "reasoning_text", "text": ""})
                    self.items[-1]["content"][0]["text"] += event.text
                    yield self._delta("reasoning_text", delta=event.text)
                case Called():
                    call = self.speaker.calls[self._called]
                    self._called += 1
                    item = {"type": "function_call", "id": _id("fc"), "call_id": call.id, "name": call.name}
                    if call.name in self.spaces:
                        space = self.spaces[call.name]
                        item |= {"namespace": space, "name": call.name.removeprefix(f"{space}.")}
                    yield from self._begin(Called, {**item, "arguments": ""}, None)
                case Passed():
                    self.items[-1]["arguments"] += event.text
                    yield self.event("response.function_call_arguments.delta", **self._where(), delta=event.text)

    def close(self, status: str = "completed") -> Iterator[bytes]:
        """The end of the newest item."""
        if self._open is None:
            return
        item = self.items[-1]
        item["status"] = status
        if self._open is Called:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self.event("response.function_call_arguments.done", **self._where(), **done)
        else:
            part = item["content"][0]
            more = {"logprobs": []} if self._open is Said else {}
            yield self.event(f"response.{part['type']}.done", **self._where(0), text=part["text"], **more)
            yield self.event("response.content_part.done", **self._where(0), part=part)
        yield self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)
        self._open = None

    def _begin(self, kind: type[Utterance], item: Output, part: Output | None) -> Iterator[bytes]:
        yield from self.close()
        self._open = kind
        self.items.append({**item, "status": "in_progress"})
        yield self.event("response.output_item.added", output_index=len(self.items) - 1, item=self.items[-1])
        if part is not None:
            yield self.event("response.content_part.added", **self._where(0), part=part)
            self.items[-1]["content"] = [part]

    def _where(self, content: int | None = None) -> dict[str, Any]:
        where = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return where if content is None else {**where, "content_index": content}

    def _delta(self, kind: str, **content: Any) -> bytes:
        return self.event(f"response.{kind}.delta", **self._where(0), **content)


def _said(text: str) -> Output:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
