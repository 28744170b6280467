"""Structural tags in Lark."""

import json

import pytest
from llguidance import LLMatcher

from rootcellar.errors import RequestError
from rootcellar.grammars.structural import lark_of


def lark(pattern):
    form = {"format": {"type": "regex", "pattern": pattern}}
    return lark_of(json.dumps(form), {}, depth=8, close_objects=False)


@pytest.mark.parametrize(
    ("pattern", "written"),
    [("a/b", r"/a\/b/"), (r"a\/b", r"/a\/b/"), (r"a\\/b", r"/a\\\/b/"), (r"\d", "/[0-9]/"), ("a\nb", r"/a\nb/")],
)
def test_a_regular_expression_is_one_terminal(pattern, written):
    made = lark(pattern)
    assert made.splitlines()[-1] == f"r0: {written}"
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(made), None)


def test_an_empty_regular_expression_is_the_empty_text():
    assert 'start: ""' in lark("")


def test_a_regular_expression_has_so_many_levels():
    lark("(" * 7 + "a" + ")" * 7)
    with pytest.raises(RequestError, match="levels deep"):
        lark("(" * 8 + "a" + ")" * 8)
