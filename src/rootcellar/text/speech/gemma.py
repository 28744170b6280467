"""Gemma's calls: ``<|tool_call>call:name{key:value}<tool_call|>``, texts between ``<|"|>``."""

from __future__ import annotations

import json
import re

from rootcellar.text.speech.incoming import Incoming, NotACall, Passed, Said, Steps
from rootcellar.text.speech.tools import Tools

_QUOTE = '<|"|>'
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_PART = re.compile(r'<\|"\|>.*?<\|"\|>|[{}\[\],]|[^{}\[\],<:]+|[:<]', re.DOTALL)
_DEEPEST = 64


def gemma(source: Incoming, _: Tools) -> Steps[None]:
    """Calls among text."""
    starts = "<|tool_call>"
    while mark := (yield from source.until((starts, "<tool_call|>"), Said))[1]:
        if mark == starts:
            yield from source.attempt(starts, _call(source))


def _call(source: Incoming) -> Steps[None]:
    yield from source.space()
    yield from source.expect("call:")
    name, mark = yield from source.until(("{", "<tool_call|>"))
    body, ended = (yield from source.until(("<tool_call|>",))) if mark == "{" else ("", mark)
    if not name.strip() or not ended:
        raise NotACall
    parts = [part for part in _PART.findall("{" + body) if not part.isspace()] if mark == "{" else ["{", "}"]
    value, end = _object(parts, 1, 0)
    if end != len(parts):
        raise NotACall
    source.call(name.strip())
    source.events.append(Passed(json.dumps(value, ensure_ascii=False)))


def _part(parts: list[str], at: int) -> str:
    if at >= len(parts):
        raise NotACall
    return parts[at]


def _object(parts: list[str], at: int, depth: int) -> tuple[dict[str, object], int]:
    """The object whose brace was passed, and the place behind it."""
    found: dict[str, object] = {}
    while _part(parts, at) != "}":
        if parts[at] == ",":
            at += 1
            continue
        key = parts[at].removeprefix(_QUOTE).removesuffix(_QUOTE).strip()
        if _part(parts, at + 1) != ":":
            raise NotACall
        found[key], at = _value(parts, at + 2, depth + 1)
    return found, at + 1


def _value(parts: list[str], at: int, depth: int) -> tuple[object, int]:
    if depth > _DEEPEST:
        raise NotACall
    part = _part(parts, at)
    if part == "{":
        return _object(parts, at + 1, depth)
    if part == "[":
        items: list[object] = []
        at += 1
        while _part(parts, at) != "]":
            if parts[at] == ",":
                at += 1
                continue
            item, at = _value(parts, at, depth + 1)
            items.append(item)
        return items, at + 1
    if part.startswith(_QUOTE):
        return part.removeprefix(_QUOTE).removesuffix(_QUOTE), at + 1
    end = at
    while _part(parts, end) not in (",", "}", "]"):
        end += 1
    return _bare("".join(parts[at:end]).strip()), end


def _bare(text: str) -> object:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if not _NUMBER.fullmatch(text):
        return text
    try:
        value: object = json.loads(text)
        json.dumps(value, allow_nan=False)
    except ValueError:  # 02139, 1e999
        return text
    return value
