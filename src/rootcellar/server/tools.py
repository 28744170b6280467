"""Tools that a request offers, and how the answer is read and bound for their sake."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from rootcellar.server.errors import invalid
from rootcellar.server.parsing import Body
from rootcellar.server_config import ServerConfig
from rootcellar.text import Tokenizer
from rootcellar.text.speech import CALLS, THOUGHTS, CallFormat, Frame, Parser, Tools, calls_of, reader, thoughts_of

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
MOST_TOOLS = 512
_ALPHABET = string.ascii_letters + string.digits


class FunctionSpec(Body):
    """A function as OpenAI's clients describe it. ``strict``: its arguments must follow ``parameters``."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Body):
    """A tool of OpenAI's: a function."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Body):
    """The function that must be called."""

    name: ToolName


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolList = Annotated[list[ToolSpec], Field(max_length=MOST_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


def for_template(tools: Sequence[ToolSpec] | None) -> list[dict[str, Any]] | None:
    """``tools`` as chat templates want them; None: there are none."""
    if not tools:
        return None
    shown = ("name", "description", "parameters")
    functions = [
        {name: value for name in shown if (value := getattr(each.function, name)) is not None} for each in tools
    ]
    return [{"type": "function", "function": function} for function in functions]


@dataclass(frozen=True)
class Formats:
    """How a server's model writes calls and thoughts (``text/speech/formats.py``); None: in no way that is known."""

    calls: str | None
    thoughts: str | None
    special: frozenset[str] = frozenset()
    """The tokenizer's special tokens, which an answer's text does not show."""

    @classmethod
    def of(cls, config: ServerConfig, tokenizer: Tokenizer | None) -> Formats:
        """What the settings say, or else the model's chat template."""
        if tokenizer is None:
            return cls(None, None)
        template = tokenizer.chat_templates
        calls = calls_of(config.tool_call_parser, template)
        if calls is None and config.tool_call_parser == "auto" and not tokenizer.knows_tools:
            calls = "hermes"  # as such models are told of tools
        return cls(calls, thoughts_of(config.reasoning_parser, template), frozenset(tokenizer.skipped.values()))


@dataclass(frozen=True)
class Listening:
    """How one request's answers are read.

    Attributes:
        tools: those that may be called; None: none may.
        calls, thoughts: the formats that are looked for.
        sampling: sampling parameters that this takes.
        begun: the prompt ends where the model is thinking.
        most_calls: how many calls count; 0: all.
        show_thoughts: thoughts are told at all.
    """

    tools: Tools | None = None
    calls: str | None = None
    thoughts: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    begun: bool = False
    most_calls: int = 0
    show_thoughts: bool = True
    dropped: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the text is all there is to it."""
        return self.thoughts is None and (self.calls is None or self.tools is None)

    def parser(self) -> Parser:
        """For one answer."""
        return Parser(reader(self.calls, self.thoughts, self.tools, self.begun), self.dropped, self.most_calls)

    def call_id(self, prefix: str) -> str:
        """A new name for a call, of the form that the model's template takes."""
        length = None if self.calls is None else CALLS[self.calls].id_length
        if length is not None:
            return "".join(secrets.choice(_ALPHABET) for _ in range(length))
        return prefix + secrets.token_hex(12)


def listening(
    formats: Formats,
    tools: Sequence[ToolSpec] | None,
    choice: ToolChoice | None,
    *,
    prompt: str,
    parallel: bool,
    thoughts: bool,
    show_thoughts: bool,
    skips_special: bool,
    has_form: bool,
) -> Listening:
    """How the answers to ``prompt`` are read and bound. ``ApiError`` for a choice that cannot be.

    Args:
        choice: OpenAI's ``tool_choice``.
        parallel: several calls may be made.
        thoughts: thoughts are told apart; ``show_thoughts``: and shown.
        skips_special: special tokens are not shown.
        has_form: the answer must have another form.
    """
    names = {each.function.name for each in tools or ()}
    if len(names) < len(tools or ()):
        raise invalid("two tools have one name", "tools")
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if named is not None and named not in names:
        raise invalid(f"tool_choice names {named!r}, and tools has no such function", "tool_choice")
    must = named is not None or choice == "required"
    if must and not names:
        raise invalid("tool_choice needs tools to choose from", "tool_choice")
    if must and has_form:
        raise invalid("tool_choice asks for a call, and an answer can follow one form only", "tool_choice")
    offered = [each.function for each in tools or () if named in (None, each.function.name)]
    known = Tools({each.name: each.parameters or {} for each in offered}) if offered and choice != "none" else None
    calls = formats.calls if known is not None else None
    if must and (calls is None or CALLS[calls].frame is None):
        calls = "listed"
    found = formats.thoughts if thoughts and not has_form else None
    begun = found is not None and THOUGHTS[found].begun(prompt)
    sampling: dict[str, Any] = {}
    if calls is not None and (must or (any(each.strict for each in offered) and not has_form)):
        form = bound(CALLS[calls], offered, must=must, parallel=parallel, found=found, prompt=prompt)
        if form is not None:
            sampling["structural_tag"] = orjson.dumps({"type": "structural_tag", "format": form}).decode()
    marks = "".join(mark for name in (calls, found) if name is not None for mark in _marks(name))
    seen = {token for token in formats.special if token in marks}
    dropped: tuple[str, ...] = ()
    if seen:
        sampling["skip_special_tokens"] = False
        dropped = tuple(sorted(formats.special - seen)) if skips_special else ()
    return Listening(
        tools=known,
        calls=calls,
        thoughts=found,
        sampling=sampling,
        begun=begun,
        most_calls=0 if parallel else 1,
        show_thoughts=show_thoughts,
        dropped=dropped,
    )


def bound(
    calls: CallFormat, tools: Sequence[FunctionSpec], *, must: bool, parallel: bool, found: str | None, prompt: str
) -> dict[str, Any] | None:
    """The structural tag (``grammars/structural.py``) of an answer that may, or ``must``, call; None: it has none."""
    frame = calls.frame
    if frame is None:
        return None
    some = {"type": "tags_with_separator", "tags": [_tag(frame, each, must) for each in tools], "at_least_one": True}
    one = not parallel or not frame.several
    some |= {"separator": frame.between, "stop_after_first": one}
    if must:
        parts = [*_thoughts(frame, found, prompt), _const(frame.before), some, _const(frame.after)]
        return {"type": "sequence", "elements": parts}
    if not frame.trigger:
        return None
    whole = {"type": "tag", "begin": frame.before, "content": some, "end": frame.after}
    tags = [whole] if frame.before else some["tags"]
    return {"type": "triggered_tags", "triggers": [frame.trigger], "tags": tags, "stop_after_first": one}


def _tag(frame: Frame, tool: FunctionSpec, must: bool) -> dict[str, Any]:
    schema = tool.parameters if tool.parameters and (must or tool.strict) else {"type": "object"}
    content = {"type": "json_schema", "json_schema": schema}
    return {"type": "tag", "begin": frame.begin.replace("NAME", tool.name), "content": content, "end": frame.end}


def _thoughts(frame: Frame, found: str | None, prompt: str) -> list[dict[str, Any]]:
    """What may come before calls that must: thoughts, where the model has some."""
    if found is None:
        return []
    thinking = THOUGHTS[found]
    begun = thinking.begun(prompt)
    if not begun and prompt.rstrip().endswith(thinking.ends):
        return []
    begins = "" if begun else thinking.begins
    thought = {"type": "tag", "begin": begins, "content": {"type": "any_text"}, "end": thinking.ends}
    between = _const(frame.resumed) if frame.resumed else {"type": "regex", "pattern": "[ \n]{0,4}"}
    whole = {"type": "sequence", "elements": [thought, between]}
    return [whole if begun else {"type": "optional", "content": whole}]


def _const(text: str) -> dict[str, str]:
    return {"type": "const_string", "value": text}


def _marks(name: str) -> tuple[str, ...]:
    marks = CALLS[name].marks if name in CALLS else ()
    return (*marks, *((THOUGHTS[name].begins, THOUGHTS[name].ends) if name in THOUGHTS else ()))
