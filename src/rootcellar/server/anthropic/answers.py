"""Answers in Anthropic's form, whole and as the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rootcellar.server.answer import Result, named_event
from rootcellar.server.openai.speaker import Speaker
from rootcellar.text.speech import Called, Passed, Said, Thought, Utterance

_STOPS = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}


def usage(result: Result, kept: int) -> dict[str, int]:
    """Tokens of one request. ``kept``: how many of the prompt it says to keep; those not cached yet are created."""
    meta = result["meta_info"]
    cached = meta["cached_tokens"]
    created = max(0, kept - cached)
    return {
        "input_tokens": meta["prompt_tokens"] - cached - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": cached,
        "output_tokens": meta["completion_tokens"],
    }


def stop(result: Result, speaker: Speaker) -> dict[str, Any]:
    """Why an answer ended."""
    reason = result["meta_info"]["finish_reason"]
    matched = reason.get("matched")
    if reason["type"] == "stop" and isinstance(matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    called = reason["type"] == "stop" and bool(speaker.calls)
    return {"stop_reason": "tool_use" if called else _STOPS[reason["type"]], "stop_sequence": None}


def message(id: str, model: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """A message of the assistant's, without why it ended and what it took."""
    return {"id": id, "type": "message", "role": "assistant", "model": model, "content": content}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # cut off
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class BlockWriter:
    """The blocks of one answer as it is made, and the events that tell of them: each is opened, grows, and is closed.

    ``content`` are those that there are; the newest is whole once it is closed.
    """

    speaker: Speaker
    content: list[dict[str, Any]] = field(default_factory=list)
    _open: type[Utterance] | None = None
    _called: int = 0

    def write(self, events: list[Utterance]) -> Iterator[bytes]:
        """What is new."""
        for event in events:
            match event:
                case Said():
                    if self._open is not Said:
                        if not event.text.strip():
                            continue
                        yield from self._begin(Said, {"type": "text", "text": ""})
                    self.content[-1]["text"] += event.text
                    yield self._delta({"type": "text_delta", "text": event.text})
                case Thought():
                    if self._open is not Thought:
                        yield from self._begin(Thought, {"type": "thinking", "thinking": "", "signature": ""})
                    self.content[-1]["thinking"] += event.text
                    yield self._delta({"type": "thinking_delta", "thinking": event.text})
                case Called():
                    call = self.speaker.calls[self._called]
                    block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                    yield from self._begin(Called, block)
                    self._called += 1
                case Passed():
                    yield self._delta({"type": "input_json_delta", "partial_json": event.text})

    def close(self) -> Iterator[bytes]:
        """The end of the newest block."""
        if self._open is Called:
            self.content[-1]["input"] = _object(self.speaker.calls[self._called - 1].arguments)
        if self._open is not None:
            yield named_event({"type": "content_block_stop", "index": len(self.content) - 1})
        self._open = None

    def _begin(self, kind: type[Utterance], block: dict[str, Any]) -> Iterator[bytes]:
        yield from self.close()
        self.content.append(block)
        self._open = kind
        yield named_event({"type": "content_block_start", "index": len(self.content) - 1, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named_event({"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta})
