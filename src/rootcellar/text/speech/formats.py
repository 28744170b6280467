"""Every format of calls and of thoughts, by SGLang's names, and which one a chat template is written for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rootcellar.text.speech import coder, gemma, harmony, objects, pythonic
from rootcellar.text.speech.incoming import Incoming, Said, Steps
from rootcellar.text.speech.thoughts import Thinking
from rootcellar.text.speech.tools import Tools


@dataclass(frozen=True)
class Frame:
    """How calls are written around the JSON of their arguments; ``NAME`` stands for the tool's.

    An answer that calls is ``before``, then calls with ``between`` between them, then ``after``. ``trigger``: what no
    text but a call begins with; empty: nothing. ``several``: there may be more than one. ``resumed``: what stands
    between thoughts and calls, beside white space.
    """

    begin: str
    end: str
    trigger: str
    before: str = ""
    between: str = ""
    after: str = ""
    several: bool = True
    resumed: str = ""


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes calls.

    Attributes:
        read: a parser of what follows the thoughts.
        marks: texts that it must see, though they may be special tokens.
        frame: None: arguments are no JSON, or their place is no text's.
        id_length: characters of a call's id, where the family's templates insist on some.
    """

    read: Callable[[Incoming, Tools], Steps[None]]
    marks: tuple[str, ...] = ()
    frame: Frame | None = None
    id_length: int | None = None


_HERMES = CallFormat(
    objects.hermes,
    ("<tool_call>", "</tool_call>"),
    Frame('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "<tool_call>", between="\n"),
)
_DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
_PYTHONIC = CallFormat(
    pythonic.pythonic, ("<|tool_call_start|>", "<|tool_call_end|>", "<|python_start|>", "<|python_end|>")
)

CALLS: Mapping[str, CallFormat] = {
    "qwen25": _HERMES,
    "qwen": _HERMES,
    "hermes": _HERMES,
    "qwen3_coder": CallFormat(coder.coder, ("<tool_call>", "</tool_call>")),
    "llama3": CallFormat(
        objects.llama,
        ("<|python_tag|>",),
        Frame('{"name": "NAME", "parameters": ', "}", '{"name"', between="; "),
    ),
    "pythonic": _PYTHONIC,
    "lfm2": _PYTHONIC,
    "mistral": CallFormat(
        objects.mistral,
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        Frame('{"name": "NAME", "arguments": ', "}", "[TOOL_CALLS]", "[TOOL_CALLS] [", ", ", "]"),
        id_length=9,
    ),
    "mistral-args": CallFormat(
        objects.mistral,
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        Frame("[TOOL_CALLS]NAME[ARGS]", "", "[TOOL_CALLS]"),
        id_length=9,
    ),
    "deepseekv3": CallFormat(
        objects.deepseek,
        _DEEPSEEK,
        Frame(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁begin｜>",
            "\n",
            "<｜tool▁calls▁end｜>",
        ),
    ),
    "deepseekv31": CallFormat(
        objects.deepseek,
        _DEEPSEEK,
        Frame(
            "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁begin｜>",
            "",
            "<｜tool▁calls▁end｜>",
        ),
    ),
    "gpt-oss": CallFormat(
        lambda source, _: harmony.harmony(source, True, True),
        harmony.MARKS,
        Frame(
            "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
            "",
            "",
            several=False,
            resumed="<|start|>assistant",
        ),
    ),
    "gemma4": CallFormat(gemma.gemma, ("<|tool_call>", "<tool_call|>", '<|"|>')),
    "listed": CallFormat(
        objects.listed, (), Frame('{"name": "NAME", "parameters": ', "}", "", before="[", between=", ", after="]")
    ),
}
"""By SGLang's names. ``mistral-args`` is what it takes ``mistral`` for, where the template says so; ``listed`` is how
an answer that must call is bound where the family's own way to write calls is no frame around JSON."""

THOUGHTS: Mapping[str, Thinking] = {
    "deepseek-r1": Thinking(always=True, breaks=_DEEPSEEK[:1]),
    "deepseek-v3": Thinking(breaks=_DEEPSEEK[:1]),
    "qwen3": Thinking(breaks=("<tool_call>",)),
    "qwen3-thinking": Thinking(always=True, breaks=("<tool_call>",)),
    "gemma4": Thinking("<|channel>thought\n", "<channel|>"),
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "gpt-oss": Thinking("<|channel|>analysis<|message|>", "<|end|>"),
}
"""By SGLang's names."""

# What a template that writes calls so has in it: the first that fits.
_CALLS_BY_TEMPLATE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "gpt-oss"),
    (("<|tool_call>", "call:"), "gemma4"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral-args"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁sep｜>", "```json"), "deepseekv3"),
    (("<｜tool▁sep｜>",), "deepseekv31"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<tool_call>",), "qwen25"),
    (("<|tool_call_start|>",), "lfm2"),
    (("[func_name1(",), "pythonic"),
    (('"parameters": ', "tools"), "llama3"),
)
_THOUGHTS_BY_TEMPLATE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "gpt-oss"),
    (("<|channel>thought",), "gemma4"),
    (("[THINK]",), "mistral"),
    (("</think>", "<｜Assistant｜>"), "deepseek-v3"),
    (("</think>",), "qwen3"),
)


def calls_of(name: str, template: str) -> str | None:
    """Which of ``CALLS`` is meant: by its ``name``, or (``auto``) by a chat template's source."""
    found = _meant(name, template, _CALLS_BY_TEMPLATE)
    return "mistral-args" if found == "mistral" and "[ARGS]" in template else found


def thoughts_of(name: str, template: str) -> str | None:
    """The same of ``THOUGHTS``."""
    return _meant(name, template, _THOUGHTS_BY_TEMPLATE)


def _meant(name: str, template: str, table: Iterable[tuple[tuple[str, ...], str]]) -> str | None:
    if name == "none":
        return None
    if name != "auto":
        return name
    return next((each for texts, each in table if all(text in template for text in texts)), None)


def reader(
    calls: str | None, thoughts: str | None, tools: Tools | None, begun: bool
) -> Callable[[Incoming], Steps[None]]:
    """The parser of one answer.

    Args:
        calls: the format that calls are looked for in; None: in none.
        thoughts: the same of thoughts.
        tools: those that the request offers; None: whatever looks like a call is text.
        begun: the prompt ends where the model is thinking already.
    """
    if "gpt-oss" in (calls, thoughts):
        may = calls is not None and tools is not None
        return functools.partial(harmony.harmony, calls=may, thoughts=thoughts is not None)

    def read(source: Incoming) -> Steps[None]:
        if thoughts is not None:
            yield from THOUGHTS[thoughts].read(source, begun)
        if calls is not None and tools is not None:
            yield from CALLS[calls].read(source, tools)
        yield from source.until((), Said)

    return read
