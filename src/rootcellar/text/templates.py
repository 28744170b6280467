"""Chat templates: small programs in a model's folder, which nobody here has read."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rootcellar.errors import RequestError
from rootcellar.models.files import read_json, read_text

_MORE_TEMPLATES = "additional_chat_templates"
# What one multiplication may make, and the largest exponent: nobody looks at the clock within one operation.
_MOST_ITEMS = 10**7
_LARGEST_EXPONENT = 1000


class TemplateTimeout(Exception):
    """A template ran for longer than it may."""


class Templates:
    """The chat templates of one model folder, compiled when they are first used."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Read ``chat_template.jinja``, ``chat_template.json`` or ``settings``, in that order."""
        self.sources: Mapping[str, str] = _read(folder, settings)
        self._compiled: dict[str, Template] = {}

    def render(self, tools: bool, seconds: float | None, variables: Mapping[str, Any]) -> str:
        """The text that the template makes of ``variables``; ``tools``: the conversation has some.

        Raises:
            RequestError: there is no template, or it does not compile, or it refuses the messages.
            TemplateTimeout: it took more than ``seconds`` (None: as long as it likes).
        """
        template = self._template("tool_use" if tools and "tool_use" in self.sources else "default")
        _clock.ends = None if seconds is None else time.monotonic() + seconds
        try:
            return str(template.render(variables))
        except (TemplateTimeout, MemoryError, RecursionError):
            raise
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program, and these are its inputs
            raise RequestError(
                f"the model's chat template refuses these messages: {type(error).__name__}: {error}"
            ) from error
        finally:
            _clock.ends = None

    def _template(self, name: str) -> Template:
        if name not in self.sources:
            known = f" named 'default' (there are {sorted(self.sources)})" if self.sources else ""
            raise RequestError(f"this model's folder has no chat template{known}; send a plain prompt instead")
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self.sources[name])
            except TemplateError as error:
                raise RequestError(f"the model's chat template does not compile: {error}") from error
        return self._compiled[name]


def _read(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    main = read_text(folder, "chat_template.jinja")
    if main is not None:
        names = sorted(file.name for file in (folder / _MORE_TEMPLATES).glob("*.jinja"))
        extra = {name: read_text(folder, f"{_MORE_TEMPLATES}/{name}") for name in names}
        return {"default": main, **{name.removesuffix(".jinja"): text for name, text in extra.items() if text}}
    given = (read_json(folder / "chat_template.json") or {}).get("chat_template") or settings.get("chat_template") or {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        return {str(row["name"]): str(row["template"]) for row in given}
    return {str(name): str(text) for name, text in given.items()}


class _Clock(threading.local):
    """When the template that runs on this thread must have ended."""

    ends: float | None = None


_clock = _Clock()


def _look_at_the_clock() -> None:
    if _clock.ends is not None and time.monotonic() > _clock.ends:
        raise TemplateTimeout


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which keeps a template from the machine, and a clock, which keeps it from going on for ever.

    Whatever can repeat looks at the clock each time: a loop's body, a macro's, and that of a call.
    """

    intercepted_binops = frozenset({"*", "**"})
    look_at_the_clock = staticmethod(_look_at_the_clock)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeating: tuple[type[nodes.Node], ...] = (nodes.For, nodes.Macro, nodes.CallBlock)
        for node in tree.find_all(repeating):
            look = nodes.Call(nodes.EnvironmentAttribute("look_at_the_clock"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(look).set_lineno(node.lineno))  # type: ignore[attr-defined]
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product or a power that is not too large to compute."""
        if operator == "**" and isinstance(right, int) and abs(right) > _LARGEST_EXPONENT:
            raise TemplateError(f"an exponent of {right} is too large")
        for number, other in ((left, right), (right, left)):
            if isinstance(number, int) and isinstance(other, str | list | tuple) and number * len(other) > _MOST_ITEMS:
                raise TemplateError(f"a product of {number * len(other)} items is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %}``, which training marks the assistant's text with: here its body, as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    @staticmethod
    def _body(caller: Callable[[], str]) -> str:
        return caller()


@functools.cache
def _environment() -> _Sandbox:
    """Jinja as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
