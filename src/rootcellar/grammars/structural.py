"""Structural tags: answers of text, fixed marks and JSON in turn, as calls of tools are.

xgrammar's format (https://github.com/mlc-ai/xgrammar, "structural tag"), as far as SGLang's and vLLM's clients use it,
and the older one of SGLang, written in llguidance's Lark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rootcellar.errors import RequestError
from rootcellar.grammars.bounds import check_depth, regex_depth, schema_depth
from rootcellar.grammars.expressions import in_lark
from rootcellar.grammars.schemas import closed

# Formats in formats; a call of a tool behind thoughts takes four.
_DEEPEST = 16
_KIND = "structural_tag"


def lark_of(source: str, special: Mapping[str, int], *, depth: int, close_objects: bool) -> str:
    """A structural tag's text in Lark. ``special``: the ids of special tokens, which no other token spells.

    ``depth`` and ``close_objects`` hold for each schema in it. ``RequestError`` when it is none.
    """
    given = json.loads(source)
    if not isinstance(given, dict):
        raise RequestError(f"{_KIND} must be an object")
    if "structures" in given:  # SGLang's older form
        tags = [{**tag, "content": {"type": "json_schema", "json_schema": tag.get("schema")}} for tag in _tags(given)]
        form: Any = {"type": "triggered_tags", "triggers": given.get("triggers"), "tags": tags}
    else:
        form = given.get("format")
    rules = _Rules(special, depth, close_objects)
    start = rules.of(form, 0)
    return "\n".join(["%llguidance {}", f"start: {start}", r"TEXT: /(.|\n)*/", *rules.lines])


class _Rules:
    """Lark's rules as they are made."""

    def __init__(self, special: Mapping[str, int], depth: int, close_objects: bool) -> None:
        self.lines: list[str] = []
        self._special = special
        self._marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._depth = depth
        self._close = close_objects

    def of(self, form: Any, level: int) -> str:
        """An expression for one format."""
        if not isinstance(form, dict) or level > _DEEPEST:
            raise RequestError(f"{_KIND}: a format must be an object, in at most {_DEEPEST} others")
        match form:
            case {"type": "const_string", "value": str(value)}:
                return self._text(value) or '""'
            case {"type": "json_schema", "json_schema": schema}:
                return self._json(schema)
            case {"type": "regex", "pattern": str(pattern)}:
                check_depth(_KIND, regex_depth(pattern), self._depth)
                return self._rule(in_lark(pattern)) if pattern else '""'
            case {"type": "any_text"}:
                return "TEXT"
            case {"type": "sequence", "elements": [_, *_] as parts}:
                return "(" + " ".join(self.of(part, level + 1) for part in parts) + ")"
            case {"type": "or", "elements": [_, *_] as parts}:
                return "(" + " | ".join(self.of(part, level + 1) for part in parts) + ")"
            case {"type": "optional", "content": content}:
                return f"({self.of(content, level + 1)})?"
            case {"type": "tag"}:
                return self._tag(form, "", level)
            case {"type": "tags_with_separator"}:
                return self._separated(form, level)
            case {"type": "triggered_tags"}:
                return self._triggered(form, level)
        raise RequestError(f"{_KIND}: no format is understood that begins with {json.dumps(form)[:100]}")

    def _rule(self, body: str, attributes: str = "") -> str:
        """A new rule; its name."""
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{attributes}: {body}")
        return name

    def _text(self, text: str) -> str:
        """``text`` as it is, special tokens in it by their ids."""
        parts, at = [], 0
        for found in self._marks.finditer(text):
            parts += [json.dumps(text[at : found.start()])] * (found.start() > at)
            parts.append(f"<[{self._special[found[0]]}]>")
            at = found.end()
        parts += [json.dumps(text[at:])] * (len(text) > at)
        return " ".join(parts)

    def _up_to(self, mark: str) -> str:
        """Any text, and the first ``mark`` behind it."""
        found = self._marks.match(mark)
        if found is not None:
            return f"TEXT {self._text(mark)}"
        end = self._marks.search(mark)
        head = mark if end is None else mark[: end.start()]
        name = self._rule(f"TEXT {json.dumps(head)}", "[lazy]")
        return f"{name} {self._text(mark[len(head) :])}"

    def _json(self, schema: Any) -> str:
        if schema is True or schema is None:
            schema = {}
        if not isinstance(schema, dict):
            raise RequestError(f"{_KIND}: a json_schema must be an object")
        check_depth(_KIND, schema_depth(schema), self._depth)
        if self._close:
            schema = closed(schema)
        # Spaces as templates write them (`tojson`): the next turn's prompt then has the same tokens.
        spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        options = {**spaces, "coerce_one_of": True}
        return self._rule("%json " + json.dumps({"x-guidance": options, **schema}))

    def _tag(self, tag: Any, trigger: str, level: int) -> str:
        """One tag, what ``trigger`` begins it with left out."""
        match tag:
            case {"begin": str(begin), "content": content, "end": str(end)} if begin.startswith(trigger):
                pass
            case _:
                raise RequestError(f"{_KIND}: a tag has begin (which begins with a trigger), content and end")
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            body = self._up_to(end)
        else:
            body = f"{self.of(content, level + 1)} {self._text(end)}"
        return f"({self._text(begin.removeprefix(trigger))} {body})"

    def _separated(self, form: Mapping[str, Any], level: int) -> str:
        one = self._rule(" | ".join(self._tag(tag, "", level) for tag in _tags(form)))
        separator = form.get("separator", "")
        if not isinstance(separator, str):
            raise RequestError(f"{_KIND}: a separator is a text")
        some = one if form.get("stop_after_first") else f"({one} ({self._text(separator)} {one})*)"
        return some if form.get("at_least_one") else f"({some})?"

    def _triggered(self, form: Mapping[str, Any], level: int) -> str:
        triggers = form.get("triggers")
        if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
            raise RequestError(f"{_KIND}: triggers is a list of texts")
        choices = []
        for trigger in triggers:
            mine = [tag for tag in _tags(form) if str(tag.get("begin", "")).startswith(trigger)]
            if mine:
                choices.append(f"{self._up_to(trigger)} ({' | '.join(self._tag(tag, trigger, level) for tag in mine)})")
        if not choices:
            raise RequestError(f"{_KIND}: no tag begins with a trigger")
        one = self._rule(" | ".join(choices))
        if form.get("stop_after_first"):
            return one if form.get("at_least_one") else f"({one} | TEXT)"
        return f"({one}{'+' if form.get('at_least_one') else '*'} TEXT)"


def _tags(form: Mapping[str, Any]) -> list[dict[str, Any]]:
    tags = form.get("tags", form.get("structures"))
    if not isinstance(tags, list) or not tags or not all(isinstance(tag, dict) for tag in tags):
        raise RequestError(f"{_KIND}: tags is a list of objects")
    return tags
