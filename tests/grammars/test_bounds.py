"""How deep grammars are, which objects are closed, and what classes of a regular expression mean."""

import json
import random

import pytest

from rootcellar.errors import RequestError
from rootcellar.grammars.bounds import gbnf_depth, longest_chain, regex_depth, schema_depth
from rootcellar.grammars.expressions import ascii_classes
from rootcellar.grammars.schemas import closed


def _chain(n, last=None):
    links = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(n)}
    return {"$defs": {**links, f"a{n}": last or {"type": "integer"}}, "$ref": "#/$defs/a0"}


@pytest.mark.parametrize(
    ("schema", "depth"),
    [
        (True, 0),
        ({}, 1),
        ({"type": "array", "items": {"items": {}}}, 3),
        ({"properties": {"a": {"type": "integer"}}}, 3),
        (_chain(10), 2 + 10 * 2 + 1),
        (_chain(2000), 2 + 2000 * 2 + 1),
        # Round and round: each of the three counts once, and then the way there.
        (_chain(2, {"$ref": "#/$defs/a0"}), 2 + 2 * 2 + 1),
        ({"$defs": {"t": {"items": {"$ref": "#"}}}, "$ref": "#/$defs/t"}, 2 + 2),
        # A property may be called like a keyword, and a value may look like a reference.
        ({"properties": {"$ref": {}, "enum": {"$ref": "#/properties/$ref"}}}, 3 + 1),
        ({"enum": [{"$ref": "#/nowhere"}]}, 3),
        ({"$defs": {"a": {"$anchor": "n"}, "b/c": {"$id": "http://x/y"}}, "anyOf": [{"$ref": "#n"}]}, 3 + 1),
        ({"$defs": {"b/c": {}}, "items": {"$ref": "#/$defs/b~1c"}}, 2 + 1),
        ({"$id": "http://x/y", "$defs": {"a": {}}, "$ref": "http://x/y#/$defs/a"}, 2 + 1),
    ],
)
def test_depth_of_schemas(schema, depth):
    assert schema_depth(json.loads(json.dumps(schema))) == depth


def test_a_reference_to_nowhere_is_named():
    with pytest.raises(RequestError, match="#/wrong"):
        schema_depth({"items": {"$ref": "#/wrong"}})


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ('root ::= "a"', 1),
        ('root ::= (("a" (b)))\nb ::= [()] "((" # ((', 1 + 3 + 1),
        ("root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(3000)) + '\na3000 ::= "x"', 3002),
        ("root ::= a\na ::= b\nb ::= a | root", 3),
        ("[" * 100_000, 0),
    ],
)
def test_depth_of_gbnf(text, depth):
    assert gbnf_depth(text) == depth


@pytest.mark.parametrize(("text", "depth"), [("a", 1), ("((a))", 3), (r"\((a)[((]", 2), ("(" * 9999, 10_000)])
def test_depth_of_expressions(text, depth):
    assert regex_depth(text) == depth


def test_chains_against_the_obvious():
    """Collapse what is on circles by brute force, then try all paths."""
    rng = random.Random(1)
    for _ in range(300):
        n = rng.randint(1, 7)
        weights = [rng.randint(1, 5) for _ in range(n)]
        edges = [sorted(rng.sample(range(n), rng.randint(0, min(3, n)))) for _ in range(n)]
        reach = [{i} for i in range(n)]
        for _ in range(n):
            for i in range(n):
                reach[i] = reach[i].union(*(reach[j] for j in edges[i]))
        circle = [frozenset(j for j in reach[i] if i in reach[j]) for i in range(n)]

        def heaviest(group, weights=weights, edges=edges, circle=circle):
            beyond = {circle[j] for i in group for j in edges[i]} - {group}
            return sum(weights[i] for i in group) + max((heaviest(g) for g in beyond), default=0)

        assert longest_chain(weights, edges) == max(heaviest(group) for group in circle)


_OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        (_OBJECT, [()]),
        ({"items": _OBJECT}, [("items",)]),
        ({"$defs": {"t": _OBJECT}, "anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}, [("$defs", "t")]),
        ({"anyOf": [_OBJECT, _OBJECT]}, [("anyOf", 0), ("anyOf", 1)]),
        ({"patternProperties": {"^a": _OBJECT}}, [(), ("patternProperties", "^a")]),
        ({"properties": {"properties": _OBJECT}}, [(), ("properties", "properties")]),
        # Open on purpose, or for a reason.
        ({**_OBJECT, "additionalProperties": True}, []),
        ({**_OBJECT, "additionalProperties": {"type": "string"}}, []),
        ({"type": "object"}, []),
        ({"enum": [{"properties": {}}]}, []),
        ({"allOf": [_OBJECT, {"properties": {"b": {}}}]}, []),
        ({**_OBJECT, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]}, []),
        ({"$defs": {"t": _OBJECT}, "$ref": "#/$defs/t", "properties": {"b": {}}}, []),
        ({"not": _OBJECT}, []),
        ({"allOf": [{"properties": {"b": _OBJECT}}, {}]}, [("allOf", 0, "properties", "b")]),
    ],
)
def test_which_objects_are_closed(schema, where):
    expected = json.loads(json.dumps(schema))
    for path in where:
        at = expected
        for step in path:
            at = at[step]
        at["additionalProperties"] = False
    assert closed(json.loads(json.dumps(schema))) == expected


def test_classes_mean_ascii():
    assert ascii_classes(r"\d\\d[\dx]\D.\w") == r"[0-9]\\d[[0-9]x][^0-9].[0-9A-Za-z_]"
