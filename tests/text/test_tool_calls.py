"""Tool calls in a chat's history, as each kind of template wants them."""

import json

import pytest

from rootcellar.text import Tokenizer
from vocabularies import write_byte_level

LOOP = "{% for m in messages %}{% for c in m.tool_calls or [] %}BODY{% endfor %}{% endfor %}"
# A line of DeepSeek V3's own template, which adds texts and asks for a content of None.
DEEPSEEK = """{%- for message in messages %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
{%- for tool in message['tool_calls'] %}
{{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json'
    + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}
{%- endfor %}{%- endif %}{%- endfor %}"""
DEEPSEEK_SAYS = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a":2, "text": "é"}\n```<｜tool▁call▁end｜>'


def call(arguments):
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return [{"role": "assistant", "content": None, "tool_calls": calls}]


def said(folder, template, messages):
    write_byte_level(folder, 512)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer(folder)
    chat = tokenizer.chat(messages)
    assert chat.text == tokenizer.apply_chat_template(messages)
    return chat.text


OBJECT = {
    "{{ c.function.arguments | tojson }}": '{"a": 2, "text": "é"}',
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}": "a=2;text=é;",
    "{{ c.function.arguments.text }}": "é",
    "{{ c.function.arguments['a'] + 1 }}": "3",
    "{% if c.function.arguments is mapping %}yes{% endif %}": "yes",
    "{{ c.function | tojson }}": '{"name": "f", "arguments": {"a": 2, "text": "é"}}',
}
TEXT = {
    "{{ '```' + c.function.arguments + '```' }}": '```{"a":2, "text": "é"}```',
    "{{ c.function.arguments }}": '{"a":2, "text": "é"}',
    "{{ 'x' ~ c.function.arguments }}": 'x{"a":2, "text": "é"}',
    "{{ c.function.arguments | trim }}": '{"a":2, "text": "é"}',
}


@pytest.mark.parametrize(("body", "expected"), [*OBJECT.items(), *TEXT.items()])
def test_arguments_are_what_the_template_uses(tmp_path, body, expected):
    assert said(tmp_path, LOOP.replace("BODY", body), call('{"a":2, "text": "é"}')) == expected


@pytest.mark.parametrize(("body", "expected"), OBJECT.items())
def test_clients_that_send_an_object_find_it(tmp_path, body, expected):
    assert said(tmp_path, LOOP.replace("BODY", body), call({"a": 2, "text": "é"})) == expected


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "3", '"x"', "null"])
def test_arguments_that_are_no_object_stay_as_they_were(tmp_path, arguments):
    assert said(tmp_path, LOOP.replace("BODY", "{{ c.function.arguments }}"), call(arguments)) == arguments


def test_deepseek_s_own_template(tmp_path):
    assert said(tmp_path, DEEPSEEK, call('{"a":2, "text": "é"}')) == DEEPSEEK_SAYS


def test_templates_that_want_a_text_of_who_says_nothing(tmp_path):
    template = "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}"
    assert said(tmp_path, template, call("{}")) == "[]"
