"""Calls written as Python's: Llama's pythonic form and LFM2's."""

from __future__ import annotations

import ast
import json

from rootcellar.text.speech.incoming import Incoming, NotACall, Passed, Said, Steps
from rootcellar.text.speech.tools import Tools

_CONSTANTS = {"true": True, "false": False, "null": None}
# Python's parser holds the interpreter for as long as it takes.
_LONGEST = 2**16


def pythonic(source: Incoming, tools: Tools) -> Steps[None]:
    """``[f(a=1), g()]`` as the whole answer, perhaps without the brackets, or behind ``<|tool_call_start|>``."""
    yield from source.space()
    names = tuple(f"{name}(" for name in tools.names)
    opened = yield from source.one_of(("[", *names))
    if opened:
        if opened != "[":
            source.push(opened)
            opened = ""
        yield from _calls(source, opened, tools)
    starts, ends = "<|tool_call_start|>", "<|tool_call_end|>"
    while mark := (yield from source.until((starts, ends, "<|python_start|>", "<|python_end|>"), Said))[1]:
        if mark == starts:
            yield from source.space()
            bracket = yield from source.one_of(("[",))
            yield from _calls(source, mark + bracket, tools)


def _calls(source: Incoming, opened: str, tools: Tools) -> Steps[None]:
    while (yield from source.attempt(opened, _call(source, tools))):
        opened = ""
        yield from source.space()
        if (yield from source.one_of((",", "]", ";"))) not in (",", ";"):
            return
        yield from source.space()


def _call(source: Incoming, tools: Tools) -> Steps[None]:
    yield from source.space()
    name, mark = yield from source.until(("(", "\n", " ", ",", "]"))
    if mark != "(" or name not in tools.names:
        raise NotACall
    text = yield from _to_the_end(source)
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        given = {word.arg: _value(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError):
        raise NotACall from None
    if call.args or None in given:
        raise NotACall
    try:
        written = json.dumps(given, ensure_ascii=False, allow_nan=False)
        written.encode()  # ValueError: half of a surrogate pair, which nobody can be sent
    except (TypeError, ValueError, RecursionError):
        raise NotACall from None
    source.call(name)
    source.events.append(Passed(written))


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_value(key)): _value(item) for key, item in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)


def _to_the_end(source: Incoming) -> Steps[str]:
    """The text up to the parenthesis that closes the call, which is taken too."""
    kept: list[str] = []
    depth, quote = 1, ""
    while len(kept) < _LONGEST:
        character = yield from source.take()
        if quote:
            if character == "\\":
                kept.append(character)
                character = yield from source.take()
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if not depth:
                return "".join(kept)
        kept.append(character)
    raise NotACall
