"""Text to ids and back, chat templates, and text as it streams."""

import datetime
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.errors import ModelError, RequestError
from rootcellar.text import Tokenizer
from vocabularies import write_byte_level, write_sentencepiece

TEXTS = [
    "",
    "the quick brown fox",
    "Ein Zug hält in Köln. 日本語 12345",
    "\U0001f98a\U0001f3f3\ufe0f\u200d\U0001f308 nai\u0308ve",
    " leading\n\n\ttabs  ",
    "a<|im_end|>b",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Qwen's and Llama 3's kind of vocabulary."""
    folder = tmp_path_factory.mktemp("byte_level")
    write_byte_level(folder, 512)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_sentencepiece(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize("strange", [511_000, (1 << 62) + 5, -1])
def test_what_is_no_token_has_no_text(byte_level, strange):
    ids = byte_level.encode("a cat")
    assert byte_level.decode([*ids[:2], strange, *ids[2:]]) == "a cat"


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_round_trip(byte_level, text):
    ids = byte_level.encode(text)
    assert all(0 <= i < byte_level.vocab_size for i in ids)
    assert byte_level.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_special_tokens(byte_level, sentencepiece):
    assert byte_level.eos_token_id == byte_level.encode("<|im_end|>")[0]
    assert byte_level.bos_token_id is None
    ids = byte_level.encode("a<|im_end|>b")
    assert byte_level.decode(ids) == "ab"
    assert byte_level.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"
    assert sentencepiece.encode("hello")[0] == 1
    assert sentencepiece.encode("hello", add_special_tokens=False)[0] != 1


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_settings_decide_what_is_put_around_a_text(tmp_path, bos, eos):
    write_sentencepiece(tmp_path)
    told = {"add_bos_token": bos, "add_eos_token": eos, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    tokenizer = Tokenizer(tmp_path)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [1] * bos + plain + [2] * eos


def stream(tokenizer, ids, sizes, skip):
    """Everything a detokenizer gives for ``ids``, in chunks of ``sizes``; checks what may never be seen on the way."""
    detokenizer = tokenizer.detokenizer(skip)
    pieces, at = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(detokenizer.add(ids[at : at + size]))
        at += size
    return "".join(pieces) + detokenizer.finish()


def ids_of(tokenizer):
    """Any ids, with those that make half characters, and with ids that the vocabulary does not have."""
    texts = st.text(max_size=8).map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    some = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=8)
    return st.lists(st.one_of(texts, some), max_size=6).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=300, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 3), max_size=40), skip=st.booleans())
def test_the_pieces_equal_the_whole(request, kind, data, sizes, skip):
    tokenizer = request.getfixturevalue(kind)
    ids = data.draw(ids_of(tokenizer))
    assert stream(tokenizer, ids, sizes, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_no_piece_of_a_real_text_holds_half_a_character(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    detokenizer = tokenizer.detokenizer()
    whole = tokenizer.decode(tokenizer.encode(text))
    seen = ""
    for id in tokenizer.encode(text):
        seen += detokenizer.add([id])
        assert whole.startswith(seen)  # no U+FFFD that is not the text's own, nothing taken back
    assert seen + detokenizer.finish() == whole


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_text_is_given_out_as_it_comes(request, kind):
    tokenizer = request.getfixturevalue(kind)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add([id]) for id in tokenizer.encode("hello, world", add_special_tokens=False)]
    assert all(pieces)
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_work_per_token_does_not_grow(request, kind, monkeypatch):
    """Even for ids that never make a character: the ids decoded again stay few."""
    tokenizer = request.getfixturevalue(kind)
    decoded = []
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, skip=True: decoded.append(len(ids)) or self._fast.decode(list(ids))
    )
    half = tokenizer.encode("é" if kind == "byte_level" else "ß", add_special_tokens=False)[-1:]
    skipped = [tokenizer.encode("<|im_end|>" if kind == "byte_level" else "</s>", add_special_tokens=False)[-1]]
    text = tokenizer.encode("hello", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    for id in half * 500 + skipped * 500 + text * 100:
        detokenizer.add([id])
    detokenizer.finish()
    assert sum(decoded) < 6 * (1000 + 100 * len(text))


MESSAGES = [{"role": "user", "content": "Hi <b> é"}]


def with_template(folder, template, **more):
    write_byte_level(folder, 512)
    given = {"eos_token": "<|im_end|>", "chat_template": template, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return Tokenizer(folder)


def test_chat_template(byte_level):
    assert byte_level.has_chat_template
    text = byte_level.apply_chat_template(MESSAGES)
    assert text == "<|im_start|>user\nHi <b> é<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.apply_chat_template(MESSAGES, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_what_templates_may_use(tmp_path):
    template = (
        "{{ eos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}\n"  # trim_blocks drops this newline
        "{% if tools is not none %}{{ tools | tojson(indent=1) }}{% endif %}{{ strftime_now('%Y') }}"
        "{% generation %}x{{ enable_thinking }}{% endgeneration %}"
    )
    tokenizer = with_template(tmp_path, template)
    text = tokenizer.apply_chat_template(MESSAGES * 2, tools=[{"name": "f"}], enable_thinking=False)
    message = '{"role": "user", "content": "Hi <b> é"}'
    year = datetime.datetime.now().year
    assert text == f'<|im_end|>{message}[\n {{\n  "name": "f"\n }}\n]{year}xFalse'
    assert '"name"' not in tokenizer.apply_chat_template(MESSAGES, enable_thinking=True)


def test_templates_of_several_files_and_names(tmp_path):
    tokenizer = with_template(tmp_path, [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
    assert tokenizer.apply_chat_template(MESSAGES) == "D"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"name": "f"}]) == "T"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES) == "J"
    (tmp_path / "chat_template.jinja").write_text("F{{ messages | length }}")
    assert Tokenizer(tmp_path).apply_chat_template(MESSAGES) == "F1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses these messages: no system role"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{% if %}", "does not compile"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        (None, "no chat template"),
        ([{"name": "other", "template": "x"}], "no chat template named 'default'.*other"),
    ],
)
def test_templates_that_fail_are_the_request_s_error(tmp_path, template, message):
    with pytest.raises(RequestError, match=message):
        with_template(tmp_path, template).apply_chat_template(MESSAGES)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json.*skip_tokenizer_init"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        Tokenizer(tmp_path)
    write_byte_level(tmp_path, 512)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        Tokenizer(tmp_path)
