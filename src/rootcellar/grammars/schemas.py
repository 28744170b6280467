"""JSON schemas as trees: where their subschemas are, where their references lead, and closing their objects.

Nothing here calls itself: a schema may be nested as deeply as its text is long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import unquote, urljoin

from rootcellar.errors import RequestError

_DATA = frozenset({"enum", "const", "default", "examples", "example"})
_DEFINITIONS = frozenset({"$defs", "definitions"})
_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas"})
_NAMED = frozenset({"properties", "patternProperties"})
_OPEN_OR_CLOSED = frozenset({"additionalProperties", "unevaluatedProperties"})
# What applies to the very value that the schema around it describes.
_TOGETHER = ("$ref", "allOf", "anyOf", "oneOf", "if", "then", "else", "not", "dependentSchemas")


class Role(Enum):
    """What a container is: a schema, a list or mapping of schemas, the definitions, or a value like any other."""

    SCHEMA = "schema"
    SCHEMAS = "schemas"
    DEFINITIONS = "definitions"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class SchemaNode:
    """One object or array of a schema's text; ``depth``: containers around it."""

    value: Any
    role: Role
    depth: int


def walk(schema: Any, *, definitions: bool = True) -> Iterator[SchemaNode]:
    """Every container in ``schema``, itself first; without ``definitions``, not what its definitions hold."""
    waiting = [SchemaNode(schema, Role.SCHEMA, 0)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node.value, dict | list):
            continue
        yield node
        if node.role is Role.DEFINITIONS and not definitions:
            continue
        pairs = node.value.items() if isinstance(node.value, dict) else ((None, each) for each in node.value)
        waiting += [SchemaNode(value, _role(node, key, value), node.depth + 1) for key, value in pairs]


def _role(parent: SchemaNode, key: str | None, value: Any) -> Role:
    if parent.role is Role.DATA or (parent.role is Role.SCHEMA and key in _DATA):
        return Role.DATA
    if parent.role is Role.SCHEMA and key in _DEFINITIONS:
        return Role.DEFINITIONS
    if isinstance(value, list) or (parent.role is Role.SCHEMA and key in _MAPS):
        return Role.SCHEMAS
    return Role.SCHEMA


class References:
    """Where the references of one schema lead."""

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._named: dict[str, Any] = {}
        base = schema.get("$id", "") if isinstance(schema, dict) else ""
        self._base = base if isinstance(base, str) else ""
        for node in walk(schema):
            if node.role is Role.SCHEMA and isinstance(node.value, dict):
                for key, mark in (("$id", ""), ("id", ""), ("$anchor", "#"), ("$dynamicAnchor", "#")):
                    name = node.value.get(key)
                    if isinstance(name, str):
                        self._named[mark + name] = node.value
                        if not mark:
                            self._named[urljoin(self._base, name)] = node.value

    def target(self, reference: str) -> Any:
        """What ``reference`` names; ``RequestError`` when that is nowhere in the schema."""
        place, _, fragment = reference.partition("#")
        if not place or place == self._base:
            start = self._root
        else:
            start = self._named.get(place, self._named.get(urljoin(self._base, place)))
        if fragment and not fragment.startswith("/"):
            return self._known(self._named.get("#" + fragment), reference)
        for part in fragment.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(start, dict):
                start = start.get(name)
            elif isinstance(start, list) and name.isdecimal() and len(name) < 9 and int(name) < len(start):
                start = start[int(name)]
            else:
                start = None
        return self._known(start, reference)

    @staticmethod
    def _known(found: Any, reference: str) -> Any:
        if found is None:
            raise RequestError(
                f"json_schema: $ref {reference[:200]!r} leads nowhere: it must name a part of the schema"
            )
        return found


def closed(schema: Any) -> Any:
    """``schema`` with ``additionalProperties: false`` wherever an object's properties are named and nothing is said.

    As xgrammar does by default, and so SGLang and vLLM. Where several schemas describe one object together (``allOf``,
    or properties beside ``anyOf`` or ``$ref``), each would forbid what the others name: those stay as they are, and so
    does what is negated. Changes ``schema`` in place.
    """
    references = References(schema)
    shared: set[int] = set()
    for node in walk(schema):
        if node.role is Role.SCHEMA and isinstance(node.value, dict):
            negated = [node.value[key] for key in ("not", "if") if isinstance(node.value.get(key), dict)]
            if len(_parts(node.value)) + bool(_NAMED & node.value.keys()) > 1:
                shared |= _group(node.value, references)
            for each in negated:
                shared |= _group(each, references)
    for node in walk(schema):
        value = node.value
        names = node.role is Role.SCHEMA and isinstance(value, dict) and _NAMED & value.keys()
        if names and not _OPEN_OR_CLOSED & value.keys() and id(value) not in shared:
            value["additionalProperties"] = False
    return schema


def _parts(schema: Mapping[str, Any]) -> list[list[Any]]:
    """The groups of schemas that describe the same value as ``schema``, all of which hold for it at once.

    The members of an ``anyOf`` are one group, of which one counts; each member of an ``allOf`` is a group of its own.
    """
    groups: list[list[Any]] = []
    for key in _TOGETHER:
        given = schema.get(key)
        match key, given:
            case ("$ref", str()):
                groups.append([given])
            case ("allOf", list()):
                groups += [[each] for each in given]
            case (_, list()):
                groups.append(list(given))
            case ("dependentSchemas", dict()):
                groups += [[each] for each in given.values()]
            case (_, dict()):
                groups.append([given])
    return groups


def _group(schema: dict[str, Any], references: References) -> set[int]:
    """The ids of ``schema`` and of all schemas that describe the same value."""
    found: set[int] = set()
    waiting: list[Any] = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            each = references.target(each)
        if isinstance(each, dict) and id(each) not in found:
            found.add(id(each))
            waiting += [member for group in _parts(each) for member in group]
    return found
