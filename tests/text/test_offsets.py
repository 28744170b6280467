"""Tokens as text: each with its own space, and where it lies in the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootcellar.text import AFTER, Offsets, Tokenizer
from vocabularies import write_byte_level, write_sentencepiece


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_sentencepiece(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    write_byte_level(folder, 512)
    return Tokenizer(folder)


def id_of(tokenizer, token):
    return tokenizer._fast.token_to_id(token)


def test_sentencepiece_tokens_keep_their_space(sentencepiece):
    assert sentencepiece.token_text(id_of(sentencepiece, "▁h")) == " h"
    assert sentencepiece.token_text(id_of(sentencepiece, "h")) == "h"
    assert sentencepiece.token_text(id_of(sentencepiece, "▁")) == " "
    ids = sentencepiece.encode("hello world")
    assert [sentencepiece.token_text(id) for id in ids] == ["<s>", " hel", "lo", " w", "or", "l", "d"]
    assert b"".join(map(sentencepiece.token_bytes, ids)) == b"<s> hello world"
    assert sentencepiece.token_bytes(id_of(sentencepiece, "<0xE6>")) == b"\xe6"
    assert sentencepiece.token_text(id_of(sentencepiece, "<tool call>")) == "<tool call>"
    assert sentencepiece.token_text(10**6) == ""


def test_special_tokens_are_written_out(byte_level):
    assert byte_level.token_text(byte_level.encode("<|im_start|>")[0]) == "<|im_start|>"


def test_where_sentencepiece_tokens_lie(sentencepiece):
    ids = sentencepiece.encode("hello world")
    assert Offsets(sentencepiece, True).prompt(ids, "hello world") == [0, 0, 3, 5, 7, 9, 10]


def test_where_special_tokens_lie(byte_level):
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = byte_level.encode(text)
    offsets = Offsets(byte_level, True).prompt(ids, text)
    texts = [byte_level.token_text(id) for id in ids]
    assert offsets[:2] == [0, 12]
    assert "".join(texts) == text
    assert offsets == [len("".join(texts[:i])) for i in range(len(ids))]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_each_token_lies_where_its_text_is(request, kind, skip, data):
    """Of a prompt and of an answer, which may hold anything: offsets grow, and what is whole reads as its token."""
    tokenizer = request.getfixturevalue(kind)
    words = st.sampled_from(["hello", " w", "o", "é", "日本", "<|im_end|>", "</s>", "\n", "  ", "<tool call>", ", "])
    prompt = data.draw(st.lists(words, min_size=1, max_size=8).map("".join))
    answer = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    ids = tokenizer.encode(prompt)
    pieces = tokenizer.detokenizer(skip, ids[-AFTER:])
    text = prompt + pieces.add(answer) + pieces.finish()
    offsets = Offsets(tokenizer, skip)
    found = offsets.prompt(ids, prompt) + offsets.answer(answer[:5], ids) + offsets.answer(answer[5:], ids)
    assert found == sorted(found)
    assert len(found) == len(ids) + len(answer)
    for id, at, end in zip(ids + answer, found, [*found[1:], len(text)], strict=True):
        piece = tokenizer.token_text(id)
        whole = "\ufffd" not in piece + text[at:end] and not tokenizer._is_byte(id)
        if whole and at < end:
            assert text[at:end].startswith((piece, piece.removeprefix(" "))) or id in tokenizer.skipped, (at, end)


def test_an_answer_goes_on_behind_its_prompt(sentencepiece):
    """The space before its first word is not taken away, as it is at the beginning of a text."""
    ids = sentencepiece.encode("hello world", add_special_tokens=False)
    behind = sentencepiece.detokenizer(True, ids[:2])
    assert behind.add(ids[2:]) + behind.finish() == " world"
    first = sentencepiece.detokenizer(True, [1])
    assert first.add(ids) + first.finish() == "hello world"
