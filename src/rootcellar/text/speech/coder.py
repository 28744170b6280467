"""Qwen3-Coder's calls: ``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``."""

from __future__ import annotations

import json

from rootcellar.text.speech.incoming import Incoming, NotACall, Passed, Said, Steps
from rootcellar.text.speech.tools import Tools


def coder(source: Incoming, tools: Tools) -> Steps[None]:
    """Calls among text; a value is read as JSON unless its parameter is a text."""
    while (yield from source.until(("<tool_call>",), Said))[1]:
        if (yield from source.attempt("<tool_call>", _call(source, tools))):
            yield from source.until(("</tool_call>",))


def _call(source: Incoming, tools: Tools) -> Steps[None]:
    yield from source.space()
    yield from source.expect("<function=")
    name, mark = yield from source.until((">", "\n"))
    if mark != ">" or not name:
        raise NotACall
    source.call(name)
    written = "{"
    while True:
        yield from source.space()
        part = yield from source.one_of(("<parameter=", "</function>"))
        if not part:
            raise NotACall
        if part == "</function>":
            break
        key, mark = yield from source.until((">", "\n"))
        value, ended = yield from source.until(("</parameter>",))
        if mark != ">" or not ended:
            raise NotACall
        value = value.removeprefix("\n").removesuffix("\n")
        known = value if tools.takes_text(name, key) else _read(value)
        source.events.append(Passed(f"{written}{json.dumps(key)}: {json.dumps(known, ensure_ascii=False)}"))
        written = ", "
    source.events.append(Passed("{}" if written == "{" else "}"))


def _read(text: str) -> object:
    try:
        value: object = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # ValueError: half of a surrogate pair
    except (ValueError, RecursionError):
        return text
    return value
