"""What answers say: thoughts, text and calls, as each family's own template writes them, wherever the text is cut."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.server_config import REASONING_PARSERS, TOOL_CALL_PARSERS
from rootcellar.text.speech import (
    CALLS,
    THOUGHTS,
    Called,
    Parser,
    Passed,
    Said,
    Thought,
    Tools,
    calls_of,
    reader,
    thoughts_of,
)

RECORDED = json.loads((Path(__file__).parent / "speech.json").read_text(encoding="utf-8"))
TOOLS = Tools({tool["function"]["name"]: tool["function"]["parameters"] for tool in RECORDED["tools"]})
FAMILIES = RECORDED["families"]
CASES = [(name, case) for name, family in FAMILIES.items() for case in family["cases"]]


def told(events):
    """(thoughts, text, [[name, arguments as text], ...])."""
    thought, text, calls = "", "", []
    for event in events:
        match event:
            case Thought():
                thought += event.text
            case Said():
                text += event.text
            case Called():
                calls.append([event.name, ""])
            case Passed():
                calls[-1][1] += event.text
    return thought, text, calls


def read(pieces, calls, thoughts=None, *, prompt="", tools=TOOLS, **options):
    begun = thoughts is not None and THOUGHTS[thoughts].begun(prompt)
    parser = Parser(reader(calls, thoughts, tools, begun), **options)
    return told([event for piece in pieces for event in parser.add(piece)] + parser.end())


def read_case(name, case, pieces):
    return read(pieces, FAMILIES[name]["calls"], FAMILIES[name]["thoughts"], prompt=case["prompt"])


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_answers_are_read_as_they_were_meant(name):
    cases = FAMILIES[name]["cases"]
    assert len(cases) >= 3
    for case in cases:
        thought, text, calls = read_case(name, case, [case["answer"]])
        assert (thought, text) == (case["thought"], case["text"])
        assert [[called, json.loads(given)] for called, given in calls] == case["calls"]


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_answers_are_the_same_cut_anywhere(name):
    """In two at every place, and in single characters."""
    for case in FAMILIES[name]["cases"]:
        answer = case["answer"]
        whole = read_case(name, case, [answer])
        assert read_case(name, case, answer) == whole
        for at in range(1, len(answer)):
            assert read_case(name, case, [answer[:at], answer[at:]]) == whole, answer[:at]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_that_break_off_say_what_there_is(name):
    """A prefix gives a prefix of each part, and never raises; a call that was begun is told."""
    for case in FAMILIES[name]["cases"]:
        _, _, calls = read_case(name, case, [case["answer"]])
        for at in range(len(case["answer"])):
            _, _, some = read_case(name, case, [case["answer"][:at]])
            assert [called for called, _ in some] == [called for called, _ in calls][: len(some)]
            assert all(whole[1].startswith(part[1]) for part, whole in zip(some, calls, strict=False))


MARKS = sorted({mark for each in CALLS.values() for mark in each.marks} | {t.begins for t in THOUGHTS.values()})
WORDS = st.sampled_from(
    [
        *MARKS, "</think>", '{"name": "now"', ', "arguments": {', '"a": "}"', "}", "[", "]", "now(", "a=1", ")", " ",
        "\n", "call:now{", "<function=now>", "<parameter=a>", "</parameter>", "</function>", "to=functions.now", "x",
        "```json\n",
    ]
)  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, max_size=12), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_any_text_is_read_the_same_however_it_is_cut(name, words, cuts):
    text = "".join(words)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    for thoughts in (None, "gpt-oss" if name == "gpt-oss" else "qwen3"):
        assert read(pieces, name, thoughts) == read([text], name, thoughts)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "gpt-oss"])
@pytest.mark.parametrize(
    "text",
    [
        "Hello.",
        " Two\n\nparagraphs.\n",
        "a < b, {x: [1]} and f(x)",
        '{"city": "Rome"}',
        "[1, 2]",
        "<tool",
        '{"name": 3}',
    ],
)
def test_text_without_calls_stays_as_it_is(name, text):
    assert read([text], name)[1:] == (text.lstrip() if name in ("llama3", "lfm2", "pythonic", "listed") else text, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", 'Well <tool_call>\n{"nome": "now"}\n</tool_call>'),
        ("hermes", "<tool_call>now</tool_call>"),
        ("hermes", '<tool_call>{"name": "now"'),
        ("llama3", '{"name": "unknown", "parameters": {}}'),
        ("pythonic", "[unknown(a=1)]"),
        ("pythonic", "[now(1)]"),
        ("pythonic", "[now(a=f())]"),
        ("pythonic", "[now(" + "(" * 3000),
        ("pythonic", "[now(a={[1]})]"),
        ("pythonic", "[now(a='\\ud800')]"),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "\\ud800"}</tool_call>'),
        ("mistral", "[TOOL_CALLS] nothing"),
        ("gemma4", "<|tool_call>call:now{a:{b:1}<tool_call|>"),
        ("gemma4", "<|tool_call>call:now{" + "a:{" * 3000 + "<tool_call|>"),
        ("qwen3_coder", "<tool_call>\n<fun"),
        ("deepseekv31", "<｜tool▁call▁begin｜>now"),
    ],
)
def test_what_is_no_call_is_shown_as_it_was_written(name, text):
    _, said, calls = read([text], name)
    assert calls == []
    assert said == text


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [["f", '{"a": 1}']]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [["f", '{"a": 1}']]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [["f", "{}"]]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool', [["f", '{"a": "</tool']]),
        ("llama3", '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now"}', [["now", "{}"]] * 2),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x[ARGS]{}', [["f", '{"a": 1}'], ["g", "{}"]]),
        ("pythonic", "[now(a=True, b=null, c=[-1, 'x'], d={'e': (1,)})]",
         [["now", '{"a": true, "b": null, "c": [-1, "x"], "d": {"e": [1]}}']]),
        ("listed", '[{"name": "now", "parameters": {"a": 1}}, {"name": "now", "parameters": {}}]',
         [["now", '{"a": 1}'], ["now", "{}"]]),
        ("gpt-oss", "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>", [["now", "{}"]]),
        ("gemma4", '<|tool_call>call:f{a:[1,<|"|>}<|"|>],b:{c:null},d:x y}<tool_call|>',
         [["f", '{"a": [1, "}"], "b": {"c": null}, "d": "x y"}']]),
        ("gemma4", "<|tool_call>call:f{a:02139,b:1e999,c:-1.5,d:٣}<tool_call|>",
         [["f", '{"a": "02139", "b": "1e999", "c": -1.5, "d": "٣"}']]),
    ],
)  # fmt: skip
def test_calls_as_models_vary_them(name, text, calls):
    assert read([text], name) == ("", "", calls)
    assert read(text, name) == ("", "", calls)


def test_a_value_that_nobody_can_be_sent_is_text():
    tools = Tools({"f": {"properties": {"a": {"type": "array"}}}})
    text = '<tool_call>\n<function=f>\n<parameter=a>\n["\\ud800"]\n</parameter>\n</function>\n</tool_call>'
    (_, arguments), *_ = read([text], "qwen3_coder", tools=tools)[2]
    assert json.loads(arguments) == {"a": '["\\ud800"]'}


def test_later_calls_are_left_out_where_one_is_wanted():
    two = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    assert read([two], "hermes", most_calls=1)[2] == [["f", "{}"]]


def test_without_tools_calls_are_text():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read([f"<think>x</think>{call}"], "hermes", "qwen3", tools=None) == ("x", call, [])
    said = "<|channel|>commentary to=functions.f<|message|>{}"
    assert read([said], "gpt-oss", "gpt-oss", tools=None) == ("", "{}", [])


def test_thoughts_end_where_a_call_begins_though_their_mark_is_missing():
    assert read(['hm\n<tool_call>{"name": "f"}</tool_call>'], "hermes", "qwen3", prompt="<think>\n") == (
        "hm", "", [["f", "{}"]],
    )  # fmt: skip


def test_special_tokens_are_left_out_wherever_they_are_cut():
    text = 'a<|eot|>b <|reserved_1|> <|python_tag|>{"name": "now", "parameters": {}}<|eot|>'
    dropped = ("<|eot|>", "<|reserved_1|>", "<|reserved|>")
    whole = read([text], "llama3", dropped=dropped)
    assert whole == ("", "ab", [["now", "{}"]])
    for at in range(len(text)):
        assert read([text[:at], text[at:]], "llama3", dropped=dropped) == whole
    assert read(["half <|reser"], "llama3", dropped=dropped)[1] == "half <|reser"


def test_what_is_read_again_is_shown_once():
    assert read(['[TOOL_CALLS]no name{"a": 1}'], "mistral")[1] == '[TOOL_CALLS]no name{"a": 1}'


def test_the_time_to_read_an_answer_grows_with_its_length():
    """Of whole answers: nothing copies, or looks through, all that is left for each piece that it takes."""

    def seconds(text, name):
        """The least of three: what else runs here adds to them, and nothing takes away."""
        took = []
        for _ in range(3):
            began = time.thread_time()
            read([text], name)
            took.append(time.thread_time() - began)
        return min(took)

    call = "now(a='some text, of the length that arguments have'), "
    for name, once, unit in (("pythonic", "[", call), ("hermes", "", '<tool_call>{"name": "now"}</tool_call> a')):
        short, long = (seconds(once + unit * n, name) for n in (250, 2_000))
        assert long < 14 * short, name  # 8 times, and up to 64 times where it is copied


def test_settings_name_every_format():
    assert set(TOOL_CALL_PARSERS) == {"auto", "none", *CALLS} - {"mistral-args", "listed"}
    assert set(REASONING_PARSERS) == {"auto", "none", *THOUGHTS}


def test_formats_are_found_in_templates():
    assert calls_of("auto", "{{ '<tool_call>' }}") == "qwen25"
    assert calls_of("auto", "<tool_call>\n<function=x>\n<parameter=y>") == "qwen3_coder"
    assert calls_of("auto", "<｜tool▁sep｜>") == "deepseekv31"
    assert calls_of("auto", "nothing") is None
    assert calls_of("mistral", "[TOOL_CALLS][ARGS]") == "mistral-args"
    assert calls_of("none", "<tool_call>") is None
    assert thoughts_of("auto", "{{ content.split('</think>')[-1] }}") == "qwen3"
    assert thoughts_of("deepseek-r1", "") == "deepseek-r1"
