"""The form that an answer must have, by every name that clients have for it.

SGLang says ``json_schema``, ``regex``, ``ebnf`` and ``structural_tag``, OpenAI ``response_format``, vLLM
``structured_outputs`` and, before that, ``guided_json`` and so on. The engine knows SGLang's four; one answer can
follow one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from rootcellar.grammars.schemas import closed
from rootcellar.server.errors import invalid
from rootcellar.server.fields import Refused
from rootcellar.server.parsing import Body

Schema = str | dict[str, Any]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
# A schema is closed on the event loop, which must not stand still.
_LONGEST_STRICT = 2**17
_ANY_OBJECT = '{"type": "object"}'
# What has a meaning in a regular expression; nothing else may be escaped.
_MEANS_SOMETHING = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")


class JsonSchemaFormat(Body):
    """A named JSON schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``."""

    ignored = {"disable_any_whitespace": "JSON comes without white space between its parts in any case"}  # noqa: RUF012
    refused = {  # noqa: RUF012
        "disable_additional_properties": Refused('say "additionalProperties": false in the schema', (False,)),
        "whitespace_pattern": Refused("JSON comes without white space between its parts"),
    }

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: Schema | None = None
    json_object: bool | None = None


class Forms(Body):
    """All of these fields; ``grammar`` says which one is meant."""

    response_format: ResponseFormat | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Schema | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def grammar(self) -> dict[str, str]:
        """The engine's sampling parameter for it; empty when none was asked for. ``ApiError`` when several were."""
        found = list(self._given())
        if len(found) > 1:
            names = " and ".join(name for name, _, _ in found)
            raise invalid(f"{names} are given: an answer can follow one of them", found[0][0])
        return {parameter: source for _, parameter, source in found}

    def form_names(self) -> dict[str, str]:
        """What the client calls the engine's parameter, for messages."""
        return {parameter: name for name, parameter, _ in self._given()}

    def _given(self) -> Iterator[tuple[str, str, str]]:
        """Each that was given: its name, the engine's parameter, and the value of that."""
        if self.structured_outputs is not None:
            yield from _structured(self.structured_outputs)
        if self.guided_json is not None:
            yield "guided_json", "json_schema", _text(self.guided_json)
        if self.guided_regex is not None:
            yield "guided_regex", "regex", self.guided_regex
        if self.guided_choice is not None:
            yield "guided_choice", "regex", _one_of(self.guided_choice)
        if self.guided_grammar is not None:
            yield "guided_grammar", "ebnf", self.guided_grammar
        if self.json_schema is not None:
            yield "json_schema", "json_schema", _text(self.json_schema)
        if self.regex is not None:
            yield "regex", "regex", self.regex
        if self.ebnf is not None:
            yield "ebnf", "ebnf", self.ebnf
        if self.structural_tag is not None:
            yield "structural_tag", "structural_tag", _text(self.structural_tag)
        if self.response_format is not None and self.response_format.type != "text":
            yield "response_format", "json_schema", _schema_of(self.response_format)


def _structured(given: StructuredOutputs) -> Iterator[tuple[str, str, str]]:
    found = []
    if given.json_ is not None:
        found.append(("structured_outputs.json", "json_schema", _text(given.json_)))
    if given.regex is not None:
        found.append(("structured_outputs.regex", "regex", given.regex))
    if given.choice is not None:
        found.append(("structured_outputs.choice", "regex", _one_of(given.choice)))
    if given.grammar is not None:
        found.append(("structured_outputs.grammar", "ebnf", given.grammar))
    if given.structural_tag is not None:
        found.append(("structured_outputs.structural_tag", "structural_tag", _text(given.structural_tag)))
    if given.json_object:
        found.append(("structured_outputs.json_object", "json_schema", _ANY_OBJECT))
    if not found:
        raise invalid(
            "structured_outputs is empty: give json, regex, choice, grammar or structural_tag", "structured_outputs"
        )
    yield from found


def _schema_of(form: ResponseFormat) -> str:
    if form.type == "json_object":
        return _ANY_OBJECT
    schema = None if form.json_schema is None else form.json_schema.schema_
    if schema is None:
        raise invalid(
            'response_format of type json_schema needs {"json_schema": {"name": ..., "schema": {...}}}',
            "response_format",
        )
    text = _text(schema)
    if form.json_schema is None or not form.json_schema.strict:
        return text
    if len(text) > _LONGEST_STRICT:
        raise invalid(f"response_format: a strict schema may have {_LONGEST_STRICT} characters", "response_format")
    return _text(closed(schema))


def _text(schema: Schema) -> str:
    return schema if isinstance(schema, str) else orjson.dumps(schema).decode()


def _one_of(choices: list[str]) -> str:
    """A regular expression for one of these texts."""
    return "|".join(f"({_MEANS_SOMETHING.sub(lambda found: chr(92) + found[0], choice)})" for choice in choices)
