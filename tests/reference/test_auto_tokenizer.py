"""Live against transformers' AutoTokenizer: ids, text and chat prompts."""

import json

import pytest

from checkpoints import make_checkpoint, make_config
from rootcellar import demo
from rootcellar.text import Tokenizer
from rootcellar.text.conversation import with_tools
from vocabularies import write_byte_level, write_sentencepiece

pytestmark = pytest.mark.reference
transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    " ",
    "the quick brown fox jumps over the lazy dog",
    "Ein Zug hält in Köln; it's 12:45 & 1,000,000 km.",
    "日本語のテキスト 한국어 العربية हिन्दी",
    "\U0001f98a\U0001f3f3\ufe0f\u200d\U0001f308 nai\u0308ve \u00a0 \ufeff",
    "def f(x):\n\treturn x**2\n\n\n    # done  \r\n",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "<s>hello</s> <unk>",
]
TEMPLATE = """{%- set ns = namespace(first=true) %}
{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>' }}{% endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if ns.first and message.role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}
    {%- set ns.first = false %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
    {{- bos_token or '' }}[{{ message['role'] | upper }}] {{ message.content.strip() }}
    {{ message.x if message.x is defined }}
    {% generation %}{{ eos_token }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}[ASSISTANT]
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}
"""
CHATS = [
    [{"role": "user", "content": 'Hi <b>"there"</b> é '}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2\n"},
        {"role": "user", "content": "sure?", "x": 3},
    ],
]
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Grüße <x>", "parameters": {"b": 1, "a": [2]}}}
]


def qwen(folder):
    (folder / "config.json").write_text(json.dumps(make_config("qwen2")))
    write_byte_level(folder, 512)


def any_class(folder):
    write_byte_level(folder, 512)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def llama2(folder):
    (folder / "config.json").write_text(json.dumps(make_config("llama2")))
    write_sentencepiece(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module", params=[qwen, any_class, llama2, "demo"], ids=["qwen", "any", "llama2", "demo"])
def both(request, tmp_path_factory):
    if request.param == "demo":
        folder = demo.path()
        if not (folder / "tokenizer.json").exists():
            pytest.skip("the demo model is not trained yet")
    else:
        folder = tmp_path_factory.mktemp("tokenizer")
        request.param(folder)
    return Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_equal(both, text):
    ours, theirs = both
    for special in (True, False):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_named_tokens_are_equal(both):
    ours, theirs = both
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "options", [{}, {"tools": TOOLS}, {"add_generation_prompt": False}, {"enable_thinking": False}]
)
def test_chat_prompts_are_equal(both, chat, options):
    """Where a template knows no tools, theirs leaves them out in silence; ours tells of them in the system message."""
    ours, theirs = both
    options = {"add_generation_prompt": True, **options}
    told = chat
    if (tools := options.get("tools")) and not ours.knows_tools:
        told = with_tools(chat, tools)
        assert "get" in told[0]["content"]
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(told, tokenize=False, **options)


def test_a_checkpoint_of_the_tests_is_one_of_transformers(tmp_path):
    folder = make_checkpoint("qwen3", tmp_path, tokenizer=True, shards=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == Tokenizer(folder).eos_token_id
