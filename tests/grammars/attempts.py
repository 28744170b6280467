"""Random schemas, expressions and grammars, nested and chained to the limits; as a program: try many of them.

python tests/grammars/attempts.py COUNT SEED    -> tries them as the engine would; status 0 when it lives
"""

from __future__ import annotations

import json
import random
import sys
from concurrent.futures import Future
from typing import Any

import numpy as np

from rootcellar import demo
from rootcellar.engine.grammar import Grammars
from rootcellar.errors import RequestError
from rootcellar.grammars.process import Bounds
from rootcellar.sampling_params import SamplingParams
from rootcellar.text import Tokenizer


def schema(rng: random.Random) -> str:
    """A chain of definitions of random shapes, in which each refers to the next and some to any other."""
    length = rng.choice([1, 3, 10, 60, 120, 250, 500, 1500])
    kinds = rng.choices(list(_LINKS), k=rng.randint(1, 3))

    def link(i: int) -> dict[str, Any]:
        other = rng.randrange(length) if rng.random() < 0.1 else i + 1
        return _LINKS[rng.choice(kinds)]({"$ref": f"#/$defs/a{min(other, length)}"}, i, rng)

    leaf = rng.choice(
        [{"type": "integer"}, {"const": "x" * rng.choice([1, 50])}, {"type": "string", "pattern": "^a+$"}]
    )
    return json.dumps(
        {"$defs": {**{f"a{i}": link(i) for i in range(length)}, f"a{length}": leaf}, "$ref": "#/$defs/a0"}
    )


def _nested(ref: dict[str, Any], levels: int) -> dict[str, Any]:
    for _ in range(levels):
        ref = {"type": "array", "items": ref}
    return ref


_LINKS: dict[str, Any] = {
    "bare": lambda ref, i, rng: ref,
    "array": lambda ref, i, rng: {"type": "array", "items": ref, "maxItems": rng.choice([1, 3, 10**6])},
    "tuple": lambda ref, i, rng: {"type": "array", "prefixItems": [ref] * rng.randint(1, 3), "items": False},
    "object": lambda ref, i, rng: {"type": "object", "properties": {"x": ref, "y": ref}, "required": ["x"]},
    "open": lambda ref, i, rng: {"type": "object", "additionalProperties": ref},
    "named": lambda ref, i, rng: {"type": "object", "patternProperties": {f"^k{i}": ref}},
    "any": lambda ref, i, rng: {"anyOf": [ref, {"const": i}, {"type": "null"}]},
    "one": lambda ref, i, rng: {"oneOf": [ref, ref]},
    "all": lambda ref, i, rng: {"allOf": [ref, {"minimum": i}]},
    "beside": lambda ref, i, rng: {**ref, "maximum": i},
    "nested": lambda ref, i, rng: _nested(ref, rng.randint(1, 40)),
    "pattern": lambda ref, i, rng: {"anyOf": [ref, {"type": "string", "pattern": expression(rng)[:200]}]},
}


def expression(rng: random.Random) -> str:
    """A regular expression: nested parentheses, repetitions of repetitions, classes."""
    text = rng.choice(["a", "[a-z]", r"\w", ".", "ab", "(x|y)"])
    for _ in range(rng.choice([1, 3, 8, 20, 100, 300])):
        count = rng.choice([2, 30, 1000])
        shape = rng.choice(["({})*", "({}|b)", "({}){{0,N}}", "x({})?", "({})+y", "({}){{N}}"])
        text = shape.format(text).replace("N", str(count))
        if len(text) > 2000:
            break
    return text


def gbnf(rng: random.Random) -> str:
    """A chain of rules of random shapes."""
    length = rng.choice([1, 3, 10, 100, 250, 500, 2000])
    kinds = rng.choices(_RULES, k=rng.randint(1, 3))
    rules = []
    for i in range(length):
        other = rng.randrange(length) if rng.random() < 0.1 else i + 1
        rules.append(f"a{i} ::= " + rng.choice(kinds).format(next=f"a{other}", same=f"a{i}"))
    last = rng.choice(['"y"', f'"y" a{length} | "w"', "[a-z]+"])
    return "\n".join(["root ::= a0", *rules, f"a{length} ::= {last}"])


_RULES = [
    "{next}",
    '"x" {next}',
    '"x" {next} {same} | "z"',
    '("x" {next})?',
    '({next} | "x")+',
    '((("x" {next}) "y")) | "w"',
    '{next} | "x"',
    "{next} {next}",
    '{same} {next} | "q"',
    "(" * 50 + "{next}" + ")" * 50,
]


def attempt(grammars: Grammars, seed: int) -> str:
    """What became of the grammar of ``seed``: compiled and followed for a few tokens, or why it was refused."""
    rng = random.Random(seed)
    name, make = rng.choice([("json_schema", schema), ("regex", expression), ("ebnf", gbnf)])
    try:
        future = grammars.start([SamplingParams(**{name: make(rng)})])
        assert isinstance(future, Future)
        (grammar,) = future.result()
    except RequestError as error:
        return str(error)
    assert grammar is not None
    for _ in range(12):
        bits = np.unpackbits(grammar.allowed().view(np.uint8), bitorder="little")
        ids = np.flatnonzero(bits[:1024])
        finish = grammar.take(int(rng.choice(ids.tolist()))) if len(ids) else None
        if finish is not None or not len(ids):
            return "ended"
    return "followed"


def main(count: int, seed: int) -> None:
    """Try so many, from ``seed`` on; says how they ended."""
    tokenizer = Tokenizer(demo.path())
    grammars = Grammars(tokenizer, 1024, (0,), Bounds(length=2**17, depth=512, seconds=4.0, close_objects=True))
    said: dict[str, int] = {}
    for each in range(seed, seed + count):
        outcome = attempt(grammars, each)
        kind = next((word for word in ("levels deep", "ended its process", "seconds") if word in outcome), outcome[:30])
        said[kind] = said.get(kind, 0) + 1
    grammars.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
