"""Calls as JSON objects: Hermes and Qwen, Llama 3, Mistral, DeepSeek."""

from __future__ import annotations

from rootcellar.text.speech.incoming import Incoming, NotACall, Passed, Said, Steps
from rootcellar.text.speech.tools import Tools

_ARGUMENTS = ("arguments", "parameters")


def named_object(source: Incoming, tools: Tools | None = None) -> Steps[None]:
    """``{"name": ..., "arguments": {...}}``, in any order; ``tools``: it must name one of them."""
    yield from source.space()
    yield from source.expect("{")
    name: str | None = None
    held = ""
    while True:
        key = yield from source.word()
        yield from source.space()
        yield from source.expect(":")
        if key == "name" and name is None:
            name = yield from source.word()
            if not name or (tools is not None and name not in tools.names):
                raise NotACall
            if held:
                source.call(name)
                source.events.append(Passed(held))
        elif key in _ARGUMENTS and not held:
            yield from source.space()
            if (yield from source.peek()) == '"':  # their text, in a text
                held = yield from source.word()
                if name is not None:
                    source.call(name)
                    source.events.append(Passed(held))
            elif name is not None:
                source.call(name)
                held = yield from source.value(Passed)
            else:
                held = yield from source.value()
        else:
            yield from source.value()
        yield from source.space()
        after = yield from source.one_of((",", "}"))
        if after != ",":
            break
    if name is None or not (held or after):
        raise NotACall
    if not held:  # a tool that takes nothing
        source.call(name)
        source.events.append(Passed("{}"))


def hermes(source: Incoming, _: Tools) -> Steps[None]:
    """``<tool_call>{...}</tool_call>``, among text."""
    while (yield from source.until(("<tool_call>",), Said))[1]:
        if (yield from source.attempt("<tool_call>", named_object(source))):
            yield from source.until(("</tool_call>",))


def llama(source: Incoming, tools: Tools) -> Steps[None]:
    """``{"name": ..., "parameters": {...}}``, several with semicolons between, as the whole answer.

    Elsewhere behind ``<|python_tag|>``. An object that names no tool is an answer like any other.
    """
    yield from source.space()
    opened = yield from source.one_of(("<|python_tag|>",))
    while opened or (yield from source.peek()) == "{":
        if not (yield from source.attempt(opened, named_object(source, tools))):
            break
        yield from source.space()
        yield from source.one_of((";", ","))
        yield from source.space()
        opened = yield from source.one_of(("<|python_tag|>",))
    while (yield from source.until(("<|python_tag|>",), Said))[1]:
        yield from source.attempt("<|python_tag|>", named_object(source, tools))


def listed(source: Incoming, tools: Tools) -> Steps[None]:
    """``[{"name": ..., "parameters": {...}}, ...]``: how an answer that must call is written, for want of better."""
    yield from source.space()
    if (yield from source.one_of(("[",))):
        opened = "["
        while (yield from source.attempt(opened, named_object(source, tools))):
            opened = ""
            yield from source.space()
            if not (yield from source.one_of((",",))):
                yield from source.one_of(("]",))
                break
    yield from source.until((), Said)


def mistral(source: Incoming, _: Tools) -> Steps[None]:
    """``[TOOL_CALLS] [{...}, ...]``, or, since 2025, ``[TOOL_CALLS]name[ARGS]{...}`` again and again."""
    mark = "[TOOL_CALLS]"
    while (yield from source.until((mark,), Said))[1]:
        opened = mark
        while (yield from source.attempt(opened, _listed_or_named(source, opened))):
            opened = ""
            yield from source.space()
            if not (yield from source.one_of((",",))):
                yield from source.one_of(("]",))
                break


def _listed_or_named(source: Incoming, opened: str) -> Steps[None]:
    yield from source.space()
    if not opened or (yield from source.one_of(("[",))):
        yield from named_object(source)
        return
    name, mark = yield from source.until(("[CALL_ID]", "[ARGS]", "{"))
    if mark == "[CALL_ID]":
        mark = (yield from source.until(("[ARGS]",)))[1]
    yield from _arguments(source, name, mark)


def deepseek(source: Incoming, _: Tools) -> Steps[None]:
    """DeepSeek V3's ``function<sep>name`` and a block of JSON, and V3.1's ``name<sep>{...}``, between their marks."""
    begins, ends = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    # The mark of the last call ends where the answer does, so whatever comes between calls is passed over.
    around = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    while mark := (yield from source.until((begins, *around), Said))[1]:
        if mark == begins and (yield from source.attempt(begins, _separated(source))):
            yield from source.until((ends,))
            yield from source.space()


def _separated(source: Incoming) -> Steps[None]:
    name, mark = yield from source.until(("<｜tool▁sep｜>", "\n\n"))
    if name.strip() == "function":
        name, mark = yield from source.until(("\n", "{"))
    if mark == "\n":
        yield from source.space()
        yield from source.one_of(("```json", "```"))
    yield from _arguments(source, name, mark)


def _arguments(source: Incoming, name: str, mark: str) -> Steps[None]:
    """The object that follows a name and the ``mark`` that ended it; empty: the answer did."""
    if mark == "{":
        source.push(mark)
    name = name.strip()
    yield from source.space()
    if not mark or not name or any(map(str.isspace, name)) or (yield from source.peek()) not in ("{", ""):
        raise NotACall
    source.call(name)
    yield from source.value(Passed)
