"""From a request's schema, regular expression or grammar to llguidance's matcher.

Used twice, in the process that tries a grammar and in the engine's own: both must do the very same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from rootcellar.errors import RequestError
from rootcellar.grammars.bounds import check_depth, gbnf_depth, regex_depth, schema_depth
from rootcellar.grammars.expressions import ascii_classes
from rootcellar.grammars.schemas import closed
from rootcellar.grammars.structural import lark_of

# What llguidance may spend; its own limits let one token of `(a{1000}){1000}` take seconds and 250 MB. With these a
# step takes half a second at the worst, and a grammar some 80 MB of states.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000, step_lexer_fuel=50_000, step_max_items=20_000, max_lexer_states=50_000
)


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens: its ``tokenizer.json`` as text, how many ids it has, and those that end an answer."""

    tokenizer: str
    size: int
    eos: tuple[int, ...]

    def read(self) -> LLTokenizer:
        """As llguidance wants it; takes half a second for 150,000 tokens."""
        return LLTokenizer(self.tokenizer, n_vocab=self.size, eos_token=list(self.eos) or None)

    @functools.cached_property
    def special(self) -> Mapping[str, int]:
        """The ids of special tokens by their texts."""
        added = json.loads(self.tokenizer)["added_tokens"]
        return {token["content"]: token["id"] for token in added if token["special"]}


def translate(kind: str, source: str, vocabulary: Vocabulary, *, depth: int, close_objects: bool) -> str:
    """``source`` of a ``kind`` (of ``sampling_params.GRAMMARS``) in llguidance's own form, at most ``depth`` levels.

    ``close_objects``: objects of a schema have no properties beyond those named, unless it says otherwise. Raises
    ``RequestError``; the converters beneath raise what they like.
    """
    if kind == "structural_tag":
        lark = lark_of(source, vocabulary.special, depth=depth, close_objects=close_objects)
        return LLMatcher.grammar_from_lark(lark)
    return _TRANSLATORS[kind](source, depth, close_objects)


def _schema(source: str, depth: int, close_objects: bool) -> str:
    schema: Any = json.loads(source)
    check_depth("json_schema", schema_depth(schema), depth)
    if close_objects:
        schema = closed(schema)
    # Free white space is a trap that small models do not leave. `oneOf` is read as `anyOf`, as in xgrammar.
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), defaults={"whitespace_flexible": False, "coerce_one_of": True}
    )


def _regex(source: str, depth: int, _: bool) -> str:
    check_depth("regex", regex_depth(source), depth)
    return LLMatcher.grammar_from_regex(ascii_classes(source))


def _gbnf(source: str, depth: int, _: bool) -> str:
    check_depth("ebnf", gbnf_depth(source), depth)
    return LLMatcher.grammar_from_lark(gbnf_to_lark(source))


_TRANSLATORS: dict[str, Callable[[str, int, bool], str]] = {"json_schema": _schema, "regex": _regex, "ebnf": _gbnf}


def matcher(words: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher of ``grammar`` at its beginning, its first step computed; ``RequestError`` when there is none."""
    made = LLMatcher(words, grammar, log_level=0, limits=_LIMITS)
    if not made.is_error():
        made.compute_bitmask()
    if made.is_error():
        raise RequestError(made.get_error().partition("\n<state>")[0])
    return made
